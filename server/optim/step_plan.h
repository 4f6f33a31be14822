#ifndef MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_
#define MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "server/optim/step.h"
#include "server/rules/rule_info.h"

namespace modelstate {

// Partial sums and updates go over blocks of this many elements, counted from the start of each
// tensor: results do not depend on who computes which block.
inline constexpr uint64_t kBlockElements = 4096;

// One storage of optimizer state as a step sees it.
struct PlannedSlot {
  RefPtr<TensorStorage> storage;  // a fresh one for the next state; null: in place
  uint8_t* data = nullptr;        // where this step writes; null: it keeps no such slot
  // Where the values are: `data` itself in place, another storage out of place, null for a slot
  // that begins now.
  const uint8_t* from = nullptr;
  double initial = 0;  // of one that begins now
};

// What one contribution holds for a parameter.
struct GradientPart {
  const uint8_t* data = nullptr;
  DType dtype = DType::kF32;
  double inverse_scale = 1;  // multiplied by, first
  double coefficient = 1;    // then by this: its share in the mean
};

// One parameter that has a gradient.
struct TensorStep {
  uint32_t index = 0;  // in the schema
  DType dtype = DType::kF32;
  uint64_t elements = 0;
  const uint8_t* parameter = nullptr;
  uint8_t* output = nullptr;  // becomes the new parameter; may be the storage of one of the parts
  RefPtr<TensorStorage> output_storage;
  uint32_t first_part = 0;  // in StepPlan::parts, in the order in which they are added
  uint32_t part_count = 0;
  // The gradient's elements lie in `output`, in the type that the step computes in: nothing is to
  // be loaded, scaled or stored.
  bool in_place = false;
  uint32_t group = 0;
  uint32_t scalars = 0;                      // in StepPlan::scalars
  uint64_t step = 0;                         // after this one
  float product = 1;                         // after this one
  std::array<PlannedSlot, kMaxSlots> slots;  // by place
};

// All that a step is going to do, in schema order.
struct StepPlan {
  Algorithm algorithm = Algorithm::kUnknown;
  std::vector<TensorStep> tensors;
  std::vector<GradientPart> parts;
  std::vector<RuleScalars> scalars;
  const StepOptions* options = nullptr;  // borrowed
  double clip_coef = 1;
  double clip_value = 0;  // 0: none
};

// Which parameters step, where their elements are. Allocates nothing on the device.
// FAILED_PRECONDITION NOT_IN_A_GROUP.
absl::StatusOr<StepPlan> MakeStepPlan(const ModuleVersion& current, const Optimizer& optimizer,
                                      const StepOptions& options,
                                      std::vector<Contribution>& contributions,
                                      const OptimizerState& state);

// Allocates the slots that begin now or that somebody else holds. On an error nothing has changed
// but the plan.
absl::Status AllocateSlots(const Optimizer& optimizer, OptimizerState& state, Device& device,
                           StepPlan* plan);

// What one call of a kernel computes.
struct WorkItem {
  uint32_t tensor = 0;  // index in StepPlan::tensors
  uint64_t begin = 0;   // elements, multiples of kBlockElements
  uint64_t end = 0;
};

// A flat list of work, cut into batches that are worth a hand-over to another thread: part of a
// large tensor, or many small ones.
struct WorkList {
  std::vector<WorkItem> items;
  std::vector<size_t> batch_ends;  // in `items`
};
WorkList MakeWorkList(const StepPlan& plan);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_
