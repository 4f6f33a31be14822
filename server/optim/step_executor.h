#ifndef MODELSTATE_SERVER_OPTIM_STEP_EXECUTOR_H_
#define MODELSTATE_SERVER_OPTIM_STEP_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/compute_pool.h"
#include "server/device/device.h"
#include "server/optim/gradient_part.h"
#include "server/optim/gradient_set.h"
#include "server/optim/instruction_set.h"

namespace modelstate {

struct StepPlan;
struct TensorStep;

// Computes the elements of steps where they are: one kind for memory that the host sees, one for a
// GPU's. The bits are the same. One step at a time, Prepare first. Not thread-safe; holds memory
// that is used again by the next step.
class StepExecutor {
 public:
  virtual ~StepExecutor() = default;

  // Makes the lists of a plan that has its slots (AllocateSlots): all that can fail for want of
  // memory. The plan is borrowed until Update has returned. RESOURCE_EXHAUSTED DEVICE_MEMORY.
  virtual absl::Status Prepare(StepPlan& plan) = 0;

  // By index of the plan's tensors; of those whose norms came with them, maybe nothing. Reads the
  // gradients only.
  virtual absl::StatusOr<std::vector<TensorNorm>> ComputeNorms() = 0;

  // Updates parameters and slots, and returns when that is done; calls `updated` once for each
  // tensor, from several threads. Does not fail but with the device, whose memory is not to be
  // trusted then. `clip_coef` is known only after the norm.
  virtual absl::Status Update(double clip_coef,
                              absl::FunctionRef<void(const TensorStep&)> updated) = 0;

  // to[i] = (add ? to[i] : 0) + from[i] * from.inverse_scale; `to` is F64 where `wide`, else F32.
  // Without `add` the two may be the same elements.
  struct Addition {
    GradientPart from;
    uint8_t* to = nullptr;
    bool wide = false;
    bool add = false;
    uint64_t elements = 0;
  };
  // All of them, each to other elements. Fails as Update does, or before it has written anything.
  virtual absl::Status Accumulate(absl::Span<const Addition> additions) = 0;
};

// `device` and `compute` are borrowed. `set`: what the host's steps run on.
absl::StatusOr<std::unique_ptr<StepExecutor>> MakeStepExecutor(
    Device& device, ComputePool& compute, InstructionSet set = SupportedInstructionSets().back());

// The executor for a module's steps: another one when the module is on another device. Not
// thread-safe.
class DeviceStepExecutor {
 public:
  // Valid until the next call. The errors of MakeStepExecutor.
  absl::StatusOr<StepExecutor*> Get(Device& device, ComputePool& compute);

 private:
  const Device* device_ = nullptr;
  std::unique_ptr<StepExecutor> executor_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_STEP_EXECUTOR_H_
