#include "server/rpc/module_convert.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"

namespace modelstate {
namespace {

// Of the lists of one LoadResult: half of what a default client takes in one message.
constexpr size_t kMaxListedBytes = size_t{2} << 20;

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

Hyperparameters HyperparametersFromProto(const v1::Hyperparameters& proto) {
  Hyperparameters result;
  if (proto.has_lr()) result.lr = proto.lr();
  if (proto.has_weight_decay()) result.weight_decay = proto.weight_decay();
  if (proto.has_maximize()) result.maximize = proto.maximize();
  if (proto.has_momentum()) result.momentum = proto.momentum();
  if (proto.has_dampening()) result.dampening = proto.dampening();
  if (proto.has_nesterov()) result.nesterov = proto.nesterov();
  if (proto.has_beta1()) result.beta1 = proto.beta1();
  if (proto.has_beta2()) result.beta2 = proto.beta2();
  if (proto.has_eps()) result.eps = proto.eps();
  return result;
}

void HyperparametersToProto(const Hyperparameters& hyperparameters, v1::Hyperparameters* proto) {
  if (hyperparameters.lr) proto->set_lr(*hyperparameters.lr);
  if (hyperparameters.weight_decay) proto->set_weight_decay(*hyperparameters.weight_decay);
  if (hyperparameters.maximize) proto->set_maximize(*hyperparameters.maximize);
  if (hyperparameters.momentum) proto->set_momentum(*hyperparameters.momentum);
  if (hyperparameters.dampening) proto->set_dampening(*hyperparameters.dampening);
  if (hyperparameters.nesterov) proto->set_nesterov(*hyperparameters.nesterov);
  if (hyperparameters.beta1) proto->set_beta1(*hyperparameters.beta1);
  if (hyperparameters.beta2) proto->set_beta2(*hyperparameters.beta2);
  if (hyperparameters.eps) proto->set_eps(*hyperparameters.eps);
}

absl::StatusOr<OptimizerConfig> OptimizerConfigFromProto(const v1::OptimizerConfig& proto) {
  OptimizerConfig config;
  switch (proto.algorithm()) {
    case v1::SGD:
      config.algorithm = Algorithm::kSgd;
      break;
    case v1::ADAMW:
      config.algorithm = Algorithm::kAdamW;
      break;
    default:
      return MakeError(
          Reason::kInvalidField,
          proto.algorithm() == v1::ALGORITHM_UNSPECIFIED
              ? std::string("optimizer.algorithm is not set; use SGD or ADAMW")
              : absl::StrCat("optimizer.algorithm ", static_cast<int>(proto.algorithm()),
                             " is not known here; use SGD or ADAMW"),
          {{"field", "optimizer.algorithm"}});
  }
  config.hyperparameters = HyperparametersFromProto(proto.hyperparameters());
  for (const v1::ParameterGroup& group : proto.groups()) {
    ParameterGroupConfig& out = config.groups.emplace_back();
    out.name = group.name();
    absl::StatusOr<Selection> selection = SelectionFromProto(group.selection());
    if (!selection.ok()) {
      return Annotate(selection.status(),
                      absl::StrCat("optimizer.groups[", config.groups.size() - 1, "]"));
    }
    out.selection = *std::move(selection);
    out.hyperparameters = HyperparametersFromProto(group.hyperparameters());
  }
  if (proto.has_max_grad_norm()) config.max_grad_norm = proto.max_grad_norm();
  if (proto.rounds().quorum() > 1) {
    return MakeError(
        Reason::kNotImplemented,
        absl::StrCat("optimizer.rounds.quorum is ", proto.rounds().quorum(),
                     ": rounds of several contributions are not built yet; leave rounds out, and "
                     "each push is a step"));
  }
  config.quorum = 1;
  if (proto.has_max_staleness()) config.max_staleness = proto.max_staleness();
  return config;
}

void OptimizerToProto(const ModuleInstance& module, const ModuleVersion& version,
                      const Optimizer& optimizer, v1::Optimizer* proto) {
  proto->set_module(module.name());
  const OptimizerConfig& config = optimizer.config();
  v1::OptimizerConfig* out = proto->mutable_config();
  out->set_algorithm(static_cast<v1::Algorithm>(config.algorithm));
  HyperparametersToProto(config.hyperparameters, out->mutable_hyperparameters());
  for (const ParameterGroupConfig& group : config.groups) {
    v1::ParameterGroup* item = out->add_groups();
    item->set_name(group.name);
    SelectionToProto(group.selection, item->mutable_selection());
    HyperparametersToProto(group.hyperparameters, item->mutable_hyperparameters());
  }
  if (config.max_grad_norm) out->set_max_grad_norm(*config.max_grad_norm);
  if (config.max_staleness) out->set_max_staleness(*config.max_staleness);
  for (const Optimizer::Group& group : optimizer.groups()) {
    v1::ParameterGroupInfo* item = proto->add_groups();
    item->set_name(group.name);
    item->set_parameter_count(group.parameter_count);
    HyperparametersToProto(group.hyperparameters, item->mutable_hyperparameters());
  }
  proto->set_step(version.step);
  proto->set_state_bytes(module.optimizer_state_bytes());
  VersionToProto(version.version, proto->mutable_version());
}

std::vector<GroupOverride> GroupOverridesFromProto(
    const google::protobuf::RepeatedPtrField<v1::GroupOverride>& proto) {
  std::vector<GroupOverride> result;
  for (const v1::GroupOverride& item : proto) {
    GroupOverride& out = result.emplace_back();
    if (item.has_group()) out.group = item.group();
    out.hyperparameters = HyperparametersFromProto(item.hyperparameters());
  }
  return result;
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
  proto->set_updated(answer.updated);
  proto->set_skipped(answer.skipped);
  proto->set_ignored(answer.ignored);
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
  proto->set_path(info.path);
  proto->set_format(info.format);
  proto->set_nbytes(info.nbytes);
  if (info.create_seconds != 0) {
    TimeToProto(absl::FromUnixSeconds(info.create_seconds), proto->mutable_create_time());
  }
  proto->set_module(info.module);
  if (info.version.number != 0) VersionToProto(info.version, proto->mutable_version());
  proto->set_step(info.step);
  proto->set_tensor_count(info.tensor_count);
  proto->set_has_optimizer(info.has_optimizer);
  for (const CheckpointInfo::FileInfo& file : info.files) {
    v1::CheckpointFile* item = proto->add_files();
    item->set_name(file.name);
    item->set_nbytes(file.nbytes);
  }
  if (info.verified) proto->set_verified(*info.verified);
  proto->set_problem(info.problem);
}

}  // namespace modelstate
