#include "common/wire/optimizer_convert.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"

namespace modelstate {
namespace {

const google::protobuf::FieldDescriptor* FieldOf(const HyperparameterField& field) {
  return v1::Hyperparameters::descriptor()->FindFieldByName(field.name);
}

}  // namespace

Hyperparameters HyperparametersFromProto(const v1::Hyperparameters& proto) {
  const google::protobuf::Reflection& reflection = *v1::Hyperparameters::GetReflection();
  Hyperparameters result;
  for (const HyperparameterField& field : HyperparameterFields()) {
    const google::protobuf::FieldDescriptor* descriptor = FieldOf(field);
    if (!reflection.HasField(proto, descriptor)) continue;
    if (field.number != nullptr) {
      result.*field.number = reflection.GetDouble(proto, descriptor);
    } else {
      result.*field.flag = reflection.GetBool(proto, descriptor);
    }
  }
  return result;
}

void HyperparametersToProto(const Hyperparameters& hyperparameters, v1::Hyperparameters* proto) {
  const google::protobuf::Reflection& reflection = *v1::Hyperparameters::GetReflection();
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (!field.is_set(hyperparameters)) continue;
    if (field.number != nullptr) {
      reflection.SetDouble(proto, FieldOf(field), *(hyperparameters.*field.number));
    } else {
      reflection.SetBool(proto, FieldOf(field), *(hyperparameters.*field.flag));
    }
  }
}

absl::StatusOr<OptimizerConfig> OptimizerConfigFromProto(const v1::OptimizerConfig& proto) {
  OptimizerConfig config;
  for (Algorithm algorithm : AllAlgorithms()) {
    if (static_cast<int>(algorithm) == proto.algorithm()) config.algorithm = algorithm;
  }
  config.hyperparameters = HyperparametersFromProto(proto.hyperparameters());
  for (const v1::ParameterGroup& group : proto.groups()) {
    ParameterGroup& out = config.groups.emplace_back();
    out.name = group.name();
    absl::StatusOr<Selection> selection = SelectionFromProto(group.selection());
    if (!selection.ok()) {
      return Annotate(selection.status(),
                      absl::StrCat("optimizer.groups[", config.groups.size() - 1, "]"));
    }
    out.selection = *std::move(selection);
    out.hyperparameters = HyperparametersFromProto(group.hyperparameters());
  }
  config.no_default_group = proto.no_default_group();
  if (proto.has_max_grad_norm()) config.max_grad_norm = proto.max_grad_norm();
  if (proto.has_max_grad_value()) config.max_grad_value = proto.max_grad_value();
  if (proto.has_max_staleness()) config.max_staleness = proto.max_staleness();
  config.master_weights = !proto.has_master_weights() || proto.master_weights();
  config.rounds.quorum = proto.rounds().quorum() == 0 ? 1 : proto.rounds().quorum();
  config.rounds.min_contributions = proto.rounds().min_contributions();
  if (proto.rounds().has_round_timeout()) {
    MS_ASSIGN_OR_RETURN(
        config.rounds.round_timeout,
        DurationFromProto(proto.rounds().round_timeout(), "optimizer.rounds.round_timeout"));
  }
  return config;
}

void OptimizerConfigToProto(const OptimizerConfig& config, v1::OptimizerConfig* proto) {
  proto->set_algorithm(static_cast<v1::Algorithm>(config.algorithm));
  HyperparametersToProto(config.hyperparameters, proto->mutable_hyperparameters());
  for (const ParameterGroup& group : config.groups) {
    v1::ParameterGroup* item = proto->add_groups();
    item->set_name(group.name);
    SelectionToProto(group.selection, item->mutable_selection());
    HyperparametersToProto(group.hyperparameters, item->mutable_hyperparameters());
  }
  proto->set_no_default_group(config.no_default_group);
  if (config.max_grad_norm) proto->set_max_grad_norm(*config.max_grad_norm);
  if (config.max_grad_value) proto->set_max_grad_value(*config.max_grad_value);
  if (config.max_staleness) proto->set_max_staleness(*config.max_staleness);
  if (!config.master_weights) proto->set_master_weights(false);
  if (config.rounds.quorum > 1) proto->mutable_rounds()->set_quorum(config.rounds.quorum);
  // One without the other is for the server to refuse.
  if (config.rounds.min_contributions > 0) {
    proto->mutable_rounds()->set_min_contributions(config.rounds.min_contributions);
  }
  if (config.rounds.round_timeout > absl::ZeroDuration()) {
    DurationToProto(config.rounds.round_timeout, proto->mutable_rounds()->mutable_round_timeout());
  }
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

void GroupOverridesToProto(const std::vector<GroupOverride>& overrides,
                           google::protobuf::RepeatedPtrField<v1::GroupOverride>* proto) {
  for (const GroupOverride& value : overrides) {
    v1::GroupOverride* item = proto->Add();
    if (value.group) item->set_group(*value.group);
    HyperparametersToProto(value.hyperparameters, item->mutable_hyperparameters());
  }
}

}  // namespace modelstate
