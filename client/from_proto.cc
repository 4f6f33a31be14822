#include "client/from_proto.h"

#include <utility>

#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/optimizer_convert.h"

namespace modelstate::client {
namespace {

absl::Duration Lenient(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

template <typename Range>
std::vector<std::string> Strings(const Range& range) {
  return std::vector<std::string>(range.begin(), range.end());
}

}  // namespace

ServerInfo FromProto(const v1::GetServerInfoResponse& proto) {
  ServerInfo value;
  value.version = proto.version();
  value.incarnation = proto.incarnation();
  for (const v1::DeviceInfo& device : proto.devices()) {
    value.devices.push_back({device.name(), device.memory_limit_bytes(), device.memory_used_bytes(),
                             device.memory_pooled_bytes()});
  }
  const v1::Limits& limits = proto.limits();
  value.max_message_bytes = limits.max_message_bytes();
  value.max_chunk_bytes = limits.max_chunk_bytes();
  value.push_memory_limit = limits.push_memory_limit_bytes();
  value.push_memory_used = limits.push_memory_used_bytes();
  value.snapshot_memory_limit = limits.snapshot_memory_limit_bytes();
  value.snapshot_memory_used = limits.snapshot_memory_used_bytes();
  value.held_versions = limits.held_versions();
  value.pins = limits.pins();
  value.running_calls = limits.running_calls();
  value.max_lease = Lenient(limits.max_lease());
  value.stream_stall_timeout = Lenient(limits.stream_stall_timeout());
  value.checkpoint_formats = Strings(proto.checkpoint_formats());
  value.optimizers = Strings(proto.optimizers());
  value.start_time = TimeFromProto(proto.start_time());
  value.module_count = proto.module_count();
  if (proto.has_periodic_saves()) {
    const v1::PeriodicSaves& saves = proto.periodic_saves();
    value.periodic_saves = {saves.saved(), saves.failed(), saves.last_error()};
  }
  return value;
}

ModuleInfo FromProto(const v1::Module& proto) {
  ModuleInfo value;
  value.name = proto.name();
  value.state = v1::ModuleState_IsValid(proto.state()) ? static_cast<ModuleState>(proto.state())
                                                       : ModuleState::kUnknown;
  value.version = VersionFromProto(proto.version());
  value.step = proto.step();
  value.schema_revision = proto.schema_revision();
  value.layout_digest = proto.layout_digest();
  value.parameter_count = proto.parameter_count();
  value.buffer_count = proto.buffer_count();
  value.parameter_elements = proto.parameter_elements();
  value.total_bytes = proto.total_bytes();
  value.device = proto.device();
  value.has_optimizer = proto.has_optimizer();
  value.metadata.insert(proto.metadata().begin(), proto.metadata().end());
  value.create_time = TimeFromProto(proto.create_time());
  return value;
}

absl::StatusOr<TensorInfo> FromProto(const v1::TensorInfo& proto) {
  TensorInfo value;
  MS_ASSIGN_OR_RETURN(value.spec, TensorSpecFromProto(proto, std::nullopt));
  value.changed_version = proto.changed_version();
  if (!proto.xxh3().empty()) value.xxh3 = DigestFromHex(proto.xxh3());
  if (proto.has_statistics()) value.statistics = FromProto(proto.statistics());
  value.slot = proto.slot();
  if (proto.has_group()) value.group = proto.group();
  return value;
}

TensorStatistics FromProto(const v1::TensorStatistics& proto) {
  return {proto.count(), proto.min(), proto.max(), proto.mean(), proto.norm(), proto.nonfinite()};
}

VersionInfo FromProto(const v1::VersionInfo& proto) {
  VersionInfo value;
  value.version = VersionFromProto(proto.version());
  value.mutation = MutationName(proto.mutation());
  value.time = TimeFromProto(proto.time());
  value.step = proto.step();
  value.schema_revision = proto.schema_revision();
  value.changed_parameters = proto.changed_parameters();
  value.changed_buffers = proto.changed_buffers();
  value.changed_bytes = proto.changed_bytes();
  value.tensors = Strings(proto.tensors());
  value.detail = proto.detail();
  value.held = proto.held();
  return value;
}

std::string MutationName(v1::MutationKind kind) {
  return v1::MutationKind_IsValid(kind) ? v1::MutationKind_Name(kind) : "UNKNOWN";
}

absl::StatusOr<OptimizerInfo> FromProto(const v1::Optimizer& proto) {
  OptimizerInfo value;
  MS_ASSIGN_OR_RETURN(value.config, OptimizerConfigFromProto(proto.config()));
  for (const v1::ParameterGroupInfo& group : proto.groups()) {
    value.groups.push_back(
        {group.name(), group.parameter_count(), HyperparametersFromProto(group.hyperparameters())});
  }
  value.step = proto.step();
  value.state_bytes = proto.state_bytes();
  value.version = VersionFromProto(proto.version());
  value.ungrouped_count = proto.ungrouped_count();
  value.ungrouped = Strings(proto.ungrouped());
  value.dropped_count = proto.dropped_count();
  value.dropped = Strings(proto.dropped());
  if (proto.has_round()) {
    value.round = OpenRound{Strings(proto.round().workers()), proto.round().contributions(),
                            proto.round().staged_bytes(), TimeFromProto(proto.round().open_time())};
  }
  value.round_memory_bytes = proto.round_memory_bytes();
  value.worker_count = proto.worker_count();
  return value;
}

StepResult FromProto(const v1::ApplyStepResponse& proto) {
  StepResult value;
  value.outcome = v1::StepOutcome_IsValid(proto.outcome())
                      ? static_cast<StepOutcome>(proto.outcome())
                      : StepOutcome::kUnknown;
  value.replayed = proto.replayed();
  value.version = VersionFromProto(proto.version());
  value.step = proto.step();
  value.contributions = proto.contributions();
  value.quorum = proto.quorum();
  value.grad_norm = proto.grad_norm();
  value.clip_coef = proto.clip_coef();
  value.nonfinite = Strings(proto.nonfinite());
  value.updated = proto.updated();
  value.skipped = proto.skipped();
  value.ignored = proto.ignored();
  value.accumulated = proto.accumulated();
  return value;
}

LoadResult FromProto(const v1::LoadResult& proto) {
  LoadResult value;
  value.module = FromProto(proto.module());
  for (const v1::KindDecision& decision : proto.decisions()) {
    value.decisions.push_back({decision.rule(), decision.parameters(), decision.buffers()});
  }
  value.missing_keys = Strings(proto.missing_keys());
  value.unexpected_keys = Strings(proto.unexpected_keys());
  value.missing_count = proto.missing_count();
  value.unexpected_count = proto.unexpected_count();
  value.loaded = proto.loaded();
  value.size_mismatches = Strings(proto.size_mismatches());
  value.size_mismatch_count = proto.size_mismatch_count();
  return value;
}

LoadCheckpointResult FromProto(const v1::LoadCheckpointResult& proto) {
  LoadCheckpointResult value;
  value.load = FromProto(proto.load());
  value.format = proto.format();
  value.optimizer_loaded = proto.optimizer_loaded();
  value.read_bytes = proto.read_bytes();
  value.path = proto.path();
  return value;
}

CheckpointInfo FromProto(const v1::Checkpoint& proto) {
  CheckpointInfo value;
  value.path = proto.path();
  value.format = proto.format();
  value.nbytes = proto.nbytes();
  value.create_time = TimeFromProto(proto.create_time());
  value.module = proto.module();
  value.version = VersionFromProto(proto.version());
  value.step = proto.step();
  value.tensor_count = proto.tensor_count();
  value.has_optimizer = proto.has_optimizer();
  value.weights_only = proto.weights_only();
  for (const v1::CheckpointFile& file : proto.files()) {
    value.files.push_back({file.name(), file.nbytes()});
  }
  if (proto.has_verified()) value.verified = proto.verified();
  value.unverifiable_tensors = proto.unverifiable_tensors();
  value.problem = proto.problem();
  return value;
}

SnapshotInfo FromProto(const v1::Snapshot& proto) {
  SnapshotInfo value;
  value.snapshot_id = proto.snapshot_id();
  value.module = proto.module();
  value.version = VersionFromProto(proto.version());
  value.step = proto.step();
  value.layout_digest = proto.layout_digest();
  value.total_bytes = proto.total_bytes();
  value.expire_time = TimeFromProto(proto.expire_time());
  value.optimizer_state = proto.optimizer_state();
  return value;
}

Progress FromProto(const v1::Progress& proto) {
  return {proto.phase(), proto.done_bytes(), proto.total_bytes()};
}

void ToProto(const LoadOptions& value, v1::LoadOptions* proto) {
  proto->set_strict(value.strict);
  proto->set_assign(value.assign);
  proto->set_strip_prefix(value.strip_prefix);
  proto->set_add_prefix(value.add_prefix);
  proto->mutable_buffers()->Assign(value.buffers.begin(), value.buffers.end());
  proto->set_dry_run(value.dry_run);
}

}  // namespace modelstate::client
