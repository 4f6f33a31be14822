#ifndef MODELSTATE_COMMON_WIRE_OPTIMIZER_CONVERT_H_
#define MODELSTATE_COMMON_WIRE_OPTIMIZER_CONVERT_H_

#include <vector>

#include "absl/status/statusor.h"
#include "common/base/optimizer_config.h"
#include "google/protobuf/repeated_ptr_field.h"
#include "modelstate/v1/step.pb.h"

// An optimizer's description <-> the wire.
namespace modelstate {

// Fields are matched by their names: a message that gains one needs it in HyperparameterFields too.
Hyperparameters HyperparametersFromProto(const v1::Hyperparameters& proto);
void HyperparametersToProto(const Hyperparameters& hyperparameters, v1::Hyperparameters* proto);

// An algorithm that is not known here is kUnknown. INVALID_FIELD, naming it: patterns past the
// limits of a selection, a duration out of range.
absl::StatusOr<OptimizerConfig> OptimizerConfigFromProto(const v1::OptimizerConfig& proto);
void OptimizerConfigToProto(const OptimizerConfig& config, v1::OptimizerConfig* proto);

std::vector<GroupOverride> GroupOverridesFromProto(
    const google::protobuf::RepeatedPtrField<v1::GroupOverride>& proto);
void GroupOverridesToProto(const std::vector<GroupOverride>& overrides,
                           google::protobuf::RepeatedPtrField<v1::GroupOverride>* proto);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_OPTIMIZER_CONVERT_H_
