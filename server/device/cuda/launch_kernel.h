#ifndef MODELSTATE_SERVER_DEVICE_CUDA_LAUNCH_KERNEL_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_LAUNCH_KERNEL_H_

#include <cuda_runtime.h>

namespace modelstate {

// Enqueues a kernel of `blocks` thread blocks. A file of its own, for nvcc alone: tests/fake_cuda
// has another of this name, which runs kernels on the host.
template <typename Work>
cudaError_t LaunchKernel(void (*kernel)(Work), unsigned blocks, unsigned threads,
                         cudaStream_t stream, const Work& work) {
  kernel<<<blocks, threads, 0, stream>>>(work);
  return cudaGetLastError();
}

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_LAUNCH_KERNEL_H_
