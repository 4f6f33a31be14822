#ifndef MODELSTATE_SERVER_DEVICE_ACCELERATOR_H_
#define MODELSTATE_SERVER_DEVICE_ACCELERATOR_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "server/device/device.h"

namespace modelstate {

// How many GPUs the driver shows; 0 too where there is none, or GPUs are not built in.
int GpuCount();

// The GPU "cuda:INDEX", in the way that this build has: cuda/ or none. FAILED_PRECONDITION when it
// is not there or GPUs are not built in.
absl::StatusOr<std::unique_ptr<Device>> MakeGpuDevice(uint32_t index, uint64_t memory_limit_bytes,
                                                      uint64_t staging_limit_bytes);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_ACCELERATOR_H_
