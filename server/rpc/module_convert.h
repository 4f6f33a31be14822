#ifndef MODELSTATE_SERVER_RPC_MODULE_CONVERT_H_
#define MODELSTATE_SERVER_RPC_MODULE_CONVERT_H_

#include <vector>

#include "absl/status/statusor.h"
#include "google/protobuf/repeated_ptr_field.h"
#include "modelstate/v1/checkpoint.pb.h"
#include "modelstate/v1/state.pb.h"
#include "modelstate/v1/step.pb.h"
#include "modelstate/v1/types.pb.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/module/module_instance.h"

// The server's domain <-> the wire. Errors are INVALID_FIELD and name the field.
namespace modelstate {

void ModuleToProto(const ModuleInstance& module, const ModuleVersion& version, v1::Module* proto);

// `version` is one whose schema `optimizer` was resolved against.
void OptimizerToProto(const ModuleInstance& module, const ModuleVersion& version,
                      const Optimizer& optimizer, v1::Optimizer* proto);

void StepAnswerToProto(const StepAnswer& answer, v1::ApplyStepResponse* proto);

// INVALID_FIELD: too many globs, or too long ones.
absl::StatusOr<LoadOptions> LoadOptionsFromProto(const v1::LoadOptions& proto);
// All but the module: decisions, keys from the `skip_keys`-th of each list on, and how many
// tensors. The lists are cut where together they would pass 2 MiB.
void LoadPlanToProto(const LoadPlan& plan, uint64_t skip_keys, v1::LoadResult* proto);

void CheckpointToProto(const CheckpointInfo& info, v1::Checkpoint* proto);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_MODULE_CONVERT_H_
