#ifndef MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_
#define MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/optim/gradient_part.h"
#include "server/optim/step.h"
#include "server/rules/rule_info.h"

namespace modelstate {

// Partial sums and updates go over blocks of this many elements, counted from the start of each
// tensor: results do not depend on who computes which block.
inline constexpr uint64_t kBlockElements = 4096;

// One storage of optimizer state as a step sees it.
struct PlannedSlot {
  uint8_t* data;  // where this step writes; null: it keeps no such slot
  // Where the values are: `data` itself in place, another storage out of place, null for a slot
  // that begins now.
  const uint8_t* from;
  double initial;  // of one that begins now
};

// One parameter that has a gradient. There may be very many: it owns nothing, and its members have
// no default values, so that an array of them is not written before the threads fill it in.
struct TensorStep {
  uint32_t index;  // in the schema
  DType dtype;
  // The gradient's elements lie in `output`, in the type that the step computes in: nothing is to
  // be loaded, scaled or stored.
  bool in_place;
  uint64_t elements;
  const uint8_t* parameter;
  uint8_t* output;  // becomes the new parameter; may be the storage of one of the parts
  RefPtr<TensorStorage>* output_storage;  // in the contributions
  const TensorNorm* norm;                 // in the contributions; null: to be computed
  uint32_t first_part;  // in StepPlan::parts, in the order in which they are added
  uint32_t part_count;
  uint32_t group;
  uint32_t scalars;                          // in StepPlan::scalars
  uint64_t step;                             // after this one
  float product;                             // after this one
  std::array<PlannedSlot, kMaxSlots> slots;  // by place
};

// A slot that this step begins, or that somebody else holds: its storage takes the place of what is
// in ParameterState::slots.
struct NewSlot {
  uint32_t tensor;  // in StepPlan::tensors
  size_t place;
  uint64_t bytes;
  RefPtr<TensorStorage> storage;
};

// All that a step is going to do, in schema order.
struct StepPlan {
  Algorithm algorithm = Algorithm::kUnknown;
  std::unique_ptr<TensorStep[]> tensor_memory;
  absl::Span<TensorStep> tensors;
  std::vector<GradientPart> parts;
  std::vector<RuleScalars> scalars;             // in no particular order
  std::vector<std::vector<NewSlot>> new_slots;  // by piece of kTensorsPerTask tensors
  const StepOptions* options = nullptr;         // borrowed
  bool norms_known = false;                     // of all tensors
  bool has_buffers = false;                     // values of buffers were pushed too
  double clip_coef = 1;
  double clip_value = 0;  // 0: none
};

// Tensors that are planned in a row by one thread: enough to be worth a hand-over.
inline constexpr size_t kTensorsPerTask = 256;

// Calls task(begin, end) for [0, count) in pieces of kTensorsPerTask, on all threads.
template <typename Task>
void ForEachPiece(size_t count, ComputePool& compute, Task task) {
  compute.ParallelFor((count + kTensorsPerTask - 1) / kTensorsPerTask, [&](size_t piece) {
    const size_t begin = piece * kTensorsPerTask;
    task(begin, std::min(count, begin + kTensorsPerTask));
  });
}

// Which parameters step, where their elements are. Borrows from `contributions` and `state`; gives
// the former the outputs that they miss. FAILED_PRECONDITION NOT_IN_A_GROUP;
// RESOURCE_EXHAUSTED PUSH_MEMORY, DEVICE_MEMORY.
absl::StatusOr<StepPlan> MakeStepPlan(const ModuleVersion& current, const Optimizer& optimizer,
                                      const StepOptions& options,
                                      std::vector<Contribution>& contributions,
                                      OptimizerState& state, ComputePool& compute);

// Allocates plan->new_slots. On an error nothing has changed but the plan. RESOURCE_EXHAUSTED
// DEVICE_MEMORY.
absl::Status AllocateSlots(const OptimizerState& state, Device& device, ComputePool& compute,
                           StepPlan* plan);

// What one call of a kernel computes.
struct WorkItem {
  uint32_t tensor = 0;  // index in StepPlan::tensors
  uint64_t begin = 0;   // elements, multiples of kBlockElements
  uint64_t end = 0;
};

// All elements of a plan in batches that are worth a hand-over to another thread: part of a large
// tensor, or many small ones.
class WorkList {
 public:
  // Borrows the plan.
  WorkList(const StepPlan& plan, ComputePool& compute);

  // Calls run(item) for pieces that together are the whole plan, on all threads. Of every tensor
  // one piece begins at 0, also of those without elements.
  template <typename Run>
  void ForEachItem(ComputePool& compute, Run run) const {
    compute.ParallelFor(begins_.size() - 1, [&](size_t batch) {
      for (Position at = begins_[batch]; at != begins_[batch + 1];) {
        const uint64_t elements = plan_->tensors[at.tensor].elements;
        const uint64_t end = PieceEnd(elements, at.element);
        run(WorkItem{at.tensor, at.element, end});
        at = end < elements ? Position{at.tensor, end} : Position{at.tensor + 1, 0};
      }
    });
  }

 private:
  struct Position {
    uint32_t tensor = 0;
    uint64_t element = 0;
    friend bool operator==(const Position&, const Position&) = default;
  };
  static uint64_t PieceEnd(uint64_t elements, uint64_t begin);

  const StepPlan* plan_;
  std::vector<Position> begins_;  // of the batches; one more behind the last
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_STEP_PLAN_H_
