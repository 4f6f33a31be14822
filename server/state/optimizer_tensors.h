#ifndef MODELSTATE_SERVER_STATE_OPTIMIZER_TENSORS_H_
#define MODELSTATE_SERVER_STATE_OPTIMIZER_TENSORS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/selection.h"
#include "common/base/tensor_spec.h"
#include "server/state/module_schema.h"
#include "server/state/optimizer.h"
#include "server/state/optimizer_state.h"

// Optimizer state as a list of tensors, and back. A tensor has the name of its parameter and a
// slot: "step" and, where the rule has one, its product ("mu_product"), both F32 without
// dimensions; and the slots of SlotInfo, in the parameter's shape.
namespace modelstate {

inline constexpr char kStepSlot[] = "step";

// Whose optimizer state `selection` is about: parameters, ascending, each tied one as its owner.
// With OPTIMIZER_STATE among them the selection's kinds do not matter. TENSOR_NOT_FOUND.
absl::StatusOr<ModuleSchema::Listing> SelectStateful(const ModuleSchema& schema,
                                                     Selection selection);

struct OptimizerTensors {
  struct Value {
    StorageRef storage;  // null: it is `scalar`
    float scalar = 0;
  };
  std::vector<TensorSpec> specs;
  std::vector<Value> values;  // of each
};

// The state of those of `parameters` that have stepped: of each the step, the slots, the product.
OptimizerTensors ListOptimizerTensors(const ModuleSchema& schema, const Optimizer& optimizer,
                                      absl::Span<const uint32_t> parameters,
                                      const OptimizerState& state);

// `view` followed by tensors of optimizer state.
std::shared_ptr<const StateView> ExtendView(const StateView& view, std::vector<TensorSpec> specs);

// What a table of such tensors is to be made into.
struct OptimizerStatePlan {
  enum class Part { kStep, kProduct, kSlot };
  struct Item {
    uint32_t parameter = 0;  // schema index, no alias
    Part part = Part::kSlot;
    // Of a slot: its place in ParameterState::slots, and what is kept.
    size_t place = 0;
    DType dtype = DType::kF32;
    uint64_t bytes = 0;
  };
  std::vector<Item> items;  // by index of the table
};

// Matches a whole table by name: a tied parameter under either of its names. Of each parameter in
// it there are the step, the product where the rule has one, and every slot that its group keeps;
// of those only "master" may be missing. INVALID_ARGUMENT INVALID_FIELD (no slot, or a tensor
// twice), NOT_A_PARAMETER, UNKNOWN_KEY, MISSING_KEY, SHAPE_MISMATCH, DTYPE_MISMATCH; NOT_FOUND
// TENSOR_NOT_FOUND; FAILED_PRECONDITION NOT_IN_A_GROUP.
absl::StatusOr<OptimizerStatePlan> PlanOptimizerState(const ModuleSchema& schema,
                                                      const Optimizer& optimizer,
                                                      absl::Span<const TensorSpec* const> table);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_OPTIMIZER_TENSORS_H_
