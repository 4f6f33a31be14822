#ifndef MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_
#define MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "server/optim/step.h"
#include "server/optim/update_rules.h"

namespace modelstate {

// Partial sums and updates go over blocks of this many elements, counted from the start of each
// tensor: results do not depend on who computes which block.
inline constexpr uint64_t kBlockElements = 4096;

// One storage of optimizer state as a step sees it.
struct PlannedSlot {
  RefPtr<TensorStorage> storage;  // a fresh one for the next state; null: in place
  uint8_t* data = nullptr;        // where this step writes
  // Where the values are: `data` itself in place, another storage out of place, null for a slot
  // that begins now.
  const uint8_t* from = nullptr;
};

// One parameter that has a gradient.
struct TensorStep {
  uint32_t index = 0;  // in the schema
  size_t entry = 0;    // in the gradient set
  DType dtype = DType::kF32;
  uint64_t elements = 0;
  const uint8_t* parameter = nullptr;
  uint8_t* gradient = nullptr;  // becomes the new parameter
  uint32_t group = 0;
  uint64_t step = 0;        // after this one
  bool has_master = false;  // slots[0]
  size_t slot_count = 0;
  std::array<PlannedSlot, kMaxSlots> slots;
  SgdScalars<double> sgd;
  AdamWScalars<double> adamw;
};

// All that a step is going to do, in schema order.
struct StepPlan {
  Algorithm algorithm = Algorithm::kSgd;
  std::vector<TensorStep> tensors;
  const StepOptions* options = nullptr;  // borrowed
};

// Which parameters step, where their elements are. Allocates nothing on the device.
absl::StatusOr<StepPlan> MakeStepPlan(const ModuleVersion& current, const Optimizer& optimizer,
                                      const StepOptions& options, const GradientSet& gradients,
                                      const OptimizerState& state);

// Allocates the slots that begin now or that somebody else holds. On an error nothing has changed
// but the plan.
absl::Status AllocateSlots(OptimizerState& state, Device& device, StepPlan* plan);

// A flat list of work: what one call of a task computes.
struct WorkItem {
  uint32_t tensor = 0;  // index in StepPlan::tensors
  uint64_t begin = 0;   // elements, multiples of kBlockElements
  uint64_t end = 0;
};
std::vector<WorkItem> MakeWorkList(const StepPlan& plan, uint64_t elements_per_item);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_
