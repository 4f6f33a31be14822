#ifndef MODELSTATE_TESTS_FAKE_CUDA_LAUNCH_KERNEL_H_
#define MODELSTATE_TESTS_FAKE_CUDA_LAUNCH_KERNEL_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

// Takes the place of server/device/cuda/launch_kernel.h where a compiler of host code compiles the
// kernels: what they use of CUDA's language, and a launch that runs thread after thread.
#undef __device__
#undef __global__
#undef __launch_bounds__
#define __device__
#define __global__
#define __launch_bounds__(...)

namespace modelstate {

struct FakeIndex {
  unsigned x = 0;
};
extern thread_local FakeIndex threadIdx, blockIdx, blockDim, gridDim;

// Enqueues `blocks` times `threads` calls of `thread`, with the indices set.
cudaError_t FakeLaunch(unsigned blocks, unsigned threads, cudaStream_t stream,
                       std::function<void()> thread);
// Exchanges eight bytes with the thread `delta` further in its group of `width`: all threads of the
// group must get here.
uint64_t FakeShuffleDown(uint64_t bits, int delta, int width);

// All threads of the block must get here.
void __syncthreads();

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta, int width) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = FakeShuffleDown(bits, delta, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename Work>
cudaError_t LaunchKernel(void (*kernel)(Work), unsigned blocks, unsigned threads,
                         cudaStream_t stream, const Work& work) {
  return FakeLaunch(blocks, threads, stream, [kernel, work] { kernel(work); });
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAKE_CUDA_LAUNCH_KERNEL_H_
