#include "server/rpc/module_convert.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/status_mapping.h"
#include "common/wire/optimizer_convert.h"

namespace modelstate {
namespace {

// Of the lists of one LoadResult: half of what a default client takes in one message.
constexpr size_t kMaxListedBytes = size_t{2} << 20;
constexpr uint64_t kNamesShown = 10;

// Adds [skip, end) of each list, with one `end` for all that is as large as fits: who asks again
// skips as many as the longest list has brought, and gets each entry once.
void ListsToProto(const LoadPlan& plan, uint64_t skip, v1::LoadResult* proto) {
  const std::pair<const std::vector<std::string>*, google::protobuf::RepeatedPtrField<std::string>*>
      lists[] = {{&plan.missing_keys, proto->mutable_missing_keys()},
                 {&plan.unexpected_keys, proto->mutable_unexpected_keys()},
                 {&plan.size_mismatches, proto->mutable_size_mismatches()}};
  size_t count = 0;
  for (const auto& [list, out] : lists) count = std::max(count, list->size());
  size_t bytes = 0;
  for (uint64_t i = skip; i < count; ++i) {
    for (const auto& [list, out] : lists) {
      if (i < list->size()) bytes += (*list)[i].size() + 5;  // tag and length
    }
    if (bytes > kMaxListedBytes && i > skip) return;
    for (const auto& [list, out] : lists) {
      if (i < list->size()) out->Add(std::string((*list)[i]));
    }
  }
}

}  // namespace

void ModuleToProto(const ModuleInstance& module, const ModuleVersion& version, v1::Module* proto) {
  const ModuleSchema& schema = *version.schema;
  proto->set_name(module.name());
  proto->set_state(static_cast<v1::ModuleState>(module.state()));
  VersionToProto(version.version, proto->mutable_version());
  proto->set_step(version.step);
  proto->set_schema_revision(schema.revision());
  proto->set_layout_digest(schema.state_dict()->layout.digest());
  proto->set_parameter_count(schema.parameter_count());
  proto->set_buffer_count(schema.buffer_count());
  proto->set_parameter_elements(schema.parameter_elements());
  proto->set_total_bytes(schema.state_dict()->layout.total_bytes());
  proto->set_device(version.device->name());
  proto->set_has_optimizer(module.optimizer() != nullptr);
  if (version.metadata != nullptr) {
    for (const auto& [key, value] : *version.metadata) (*proto->mutable_metadata())[key] = value;
  }
  TimeToProto(module.create_time(), proto->mutable_create_time());
}

void OptimizerToProto(const ModuleInstance& module, const ModuleVersion& version,
                      const Optimizer& optimizer, v1::Optimizer* proto) {
  proto->set_module(module.name());
  OptimizerConfigToProto(optimizer.config(), proto->mutable_config());
  for (const Optimizer::Group& group : optimizer.groups()) {
    v1::ParameterGroupInfo* item = proto->add_groups();
    item->set_name(group.name);
    item->set_parameter_count(group.parameter_count);
    HyperparametersToProto(group.hyperparameters, item->mutable_hyperparameters());
  }
  proto->set_step(version.step);
  proto->set_state_bytes(module.optimizer_state_bytes());
  VersionToProto(version.version, proto->mutable_version());
  const ModuleInstance::TrainingInfo training = module.training_info();
  if (training.round.contributions > 0) {
    v1::OpenRound* round = proto->mutable_round();
    round->mutable_workers()->Assign(training.round.workers.begin(), training.round.workers.end());
    round->set_contributions(training.round.contributions);
    round->set_staged_bytes(training.round.staged_bytes);
    TimeToProto(training.round.open_time, round->mutable_open_time());
  }
  proto->set_round_memory_bytes(training.round_memory_bytes);
  proto->set_worker_count(training.workers);
  proto->set_ungrouped_count(optimizer.ungrouped_count());
  const ModuleSchema& schema = *version.schema;
  for (uint32_t i = 0; i < schema.size(); ++i) {
    if (static_cast<uint64_t>(proto->ungrouped_size()) ==
        std::min<uint64_t>(optimizer.ungrouped_count(), kNamesShown)) {
      break;
    }
    if (schema.spec(i).kind != TensorKind::kParameter || schema.owner(i) != i) continue;
    if (optimizer.group_of(i) == Optimizer::kNoGroup) proto->add_ungrouped(schema.spec(i).name);
  }
}

void StepAnswerToProto(const StepAnswer& answer, v1::ApplyStepResponse* proto) {
  proto->set_outcome(static_cast<v1::StepOutcome>(answer.outcome));
  proto->set_replayed(answer.replayed);
  VersionToProto(answer.version, proto->mutable_version());
  proto->set_step(answer.step);
  proto->set_contributions(answer.contributions);
  proto->set_quorum(answer.quorum);
  proto->set_grad_norm(answer.grad_norm);
  proto->set_clip_coef(answer.clip_coef);
  for (const std::string& name : answer.nonfinite) proto->add_nonfinite(name);
  for (const std::string& name : answer.nonfinite_workers) proto->add_nonfinite_workers(name);
  proto->set_updated(answer.updated);
  proto->set_skipped(answer.skipped);
  proto->set_ignored(answer.ignored);
  proto->set_accumulated(answer.accumulated);
}

absl::StatusOr<LoadOptions> LoadOptionsFromProto(const v1::LoadOptions& proto) {
  MS_RETURN_IF_ERROR(CheckPatterns(proto.buffers(), "options.buffers"));
  // A prefix is put before every name: a long one would take memory before anything is admitted.
  for (const auto& [prefix, field] :
       {std::pair<const std::string&, const char*>{proto.strip_prefix(), "options.strip_prefix"},
        {proto.add_prefix(), "options.add_prefix"}}) {
    if (prefix.size() <= kMaxTensorNameBytes) continue;
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(field, " has ", prefix.size(), " bytes; names have at most ",
                                  kMaxTensorNameBytes, ": use a shorter one"),
                     {{"field", field}});
  }
  LoadOptions options;
  options.strict = proto.has_strict() ? proto.strict() : true;
  options.assign = proto.assign();
  options.strip_prefix = proto.strip_prefix();
  options.add_prefix = proto.add_prefix();
  options.buffer_globs.assign(proto.buffers().begin(), proto.buffers().end());
  options.dry_run = proto.dry_run();
  options.skip_keys = proto.skip_keys();
  return options;
}

void LoadPlanToProto(const LoadPlan& plan, uint64_t skip_keys, v1::LoadResult* proto) {
  for (const LoadPlan::Decision& decision : plan.decisions) {
    v1::KindDecision* item = proto->add_decisions();
    item->set_rule(decision.rule);
    item->set_parameters(decision.parameters);
    item->set_buffers(decision.buffers);
  }
  ListsToProto(plan, skip_keys, proto);
  proto->set_missing_count(plan.missing_keys.size());
  proto->set_unexpected_count(plan.unexpected_keys.size());
  proto->set_size_mismatch_count(plan.size_mismatches.size());
  proto->set_loaded(plan.items.size());
}

void CheckpointToProto(const CheckpointInfo& info, v1::Checkpoint* proto) {
  proto->set_path(ToUtf8(info.path));
  proto->set_format(info.format);
  proto->set_nbytes(info.nbytes);
  if (info.create_time != absl::UnixEpoch()) {
    TimeToProto(info.create_time, proto->mutable_create_time());
  }
  proto->set_module(info.module);
  if (info.version.number != 0) VersionToProto(info.version, proto->mutable_version());
  proto->set_step(info.step);
  proto->set_tensor_count(info.tensor_count);
  proto->set_has_optimizer(info.has_optimizer);
  proto->set_weights_only(info.weights_only);
  for (const CheckpointInfo::FileInfo& file : info.files) {
    v1::CheckpointFile* item = proto->add_files();
    item->set_name(ToUtf8(file.name));
    item->set_nbytes(file.nbytes);
  }
  if (info.verified) proto->set_verified(*info.verified);
  proto->set_unverifiable_tensors(info.unverifiable_tensors);
  proto->set_problem(ToUtf8(info.problem));
}

}  // namespace modelstate
