#include "absl/strings/str_cat.h"
#include "server/optim/device_steps.h"

namespace modelstate {

absl::StatusOr<std::unique_ptr<StepExecutor>> MakeGpuStepExecutor(Device& device, ComputePool&) {
  return absl::FailedPreconditionError(
      absl::StrCat("device ", device.name(), ": support for GPUs is not built in"));
}

}  // namespace modelstate
