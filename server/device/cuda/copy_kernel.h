#ifndef MODELSTATE_SERVER_DEVICE_CUDA_COPY_KERNEL_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_COPY_KERNEL_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace modelstate {

// Copies within the current device by a kernel of 16-byte accesses and nothing else: what other
// kernels' speed is compared with. Enqueues and returns. REQUIRES: all three multiples of 16.
cudaError_t LaunchCopy(void* to, const void* from, uint64_t bytes, cudaStream_t stream);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_COPY_KERNEL_H_
