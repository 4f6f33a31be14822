#include "server/device/cuda/copy_kernel.h"

namespace modelstate {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kUnroll = 4;

__global__ void CopyKernel(uint4* to, const uint4* from, uint64_t count) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * kThreads * kUnroll;
  for (uint64_t base = blockIdx.x * uint64_t{kThreads * kUnroll} + threadIdx.x; base < count;
       base += stride) {
    uint4 words[kUnroll];
#pragma unroll
    for (unsigned k = 0; k < kUnroll; ++k) {
      if (base + k * kThreads < count) words[k] = __ldcs(from + base + k * kThreads);
    }
#pragma unroll
    for (unsigned k = 0; k < kUnroll; ++k) {
      if (base + k * kThreads < count) __stcs(to + base + k * kThreads, words[k]);
    }
  }
}

}  // namespace

cudaError_t LaunchCopy(void* to, const void* from, uint64_t bytes, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess || bytes == 0) return error;
  CopyKernel<<<static_cast<unsigned>(processors) * 8, kThreads, 0, stream>>>(
      static_cast<uint4*>(to), static_cast<const uint4*>(from), bytes / sizeof(uint4));
  return cudaGetLastError();
}

}  // namespace modelstate
