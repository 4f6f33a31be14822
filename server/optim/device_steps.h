#ifndef MODELSTATE_SERVER_OPTIM_DEVICE_STEPS_H_
#define MODELSTATE_SERVER_OPTIM_DEVICE_STEPS_H_

#include <memory>

#include "absl/status/statusor.h"
#include "server/optim/step_executor.h"

namespace modelstate {

// For a device whose memory the host does not see, in the way that this build has: cuda/ or none.
absl::StatusOr<std::unique_ptr<StepExecutor>> MakeGpuStepExecutor(Device& device,
                                                                  ComputePool& compute);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_DEVICE_STEPS_H_
