#include "server/device/cuda/copy_list.h"
#include "server/device/cuda/launch_kernel.h"

namespace modelstate {
namespace {

constexpr unsigned kThreads = 128;

template <typename Word>
__device__ void CopyWords(const CudaCopy& copy, uint64_t words) {
  const Word* const from = reinterpret_cast<const Word*>(copy.from);
  Word* const to = reinterpret_cast<Word*>(copy.to);
  for (uint64_t i = threadIdx.x; i < words; i += kThreads) to[i] = from[i];
}

__global__ void CopyListKernel(CudaCopyWork work) {
  const CudaCopy copy = work.copies[blockIdx.x];
  const uint64_t places =
      reinterpret_cast<uintptr_t>(copy.from) | reinterpret_cast<uintptr_t>(copy.to) | copy.bytes;
  if (places % sizeof(uint4) == 0) {
    CopyWords<uint4>(copy, copy.bytes / sizeof(uint4));
  } else if (places % sizeof(uint32_t) == 0) {
    CopyWords<uint32_t>(copy, copy.bytes / sizeof(uint32_t));
  } else {
    CopyWords<uint8_t>(copy, copy.bytes);
  }
}

}  // namespace

cudaError_t LaunchCopyList(const CudaCopyWork& work, cudaStream_t stream) {
  if (work.count == 0) return cudaSuccess;
  return LaunchKernel(CopyListKernel, static_cast<unsigned>(work.count), kThreads, stream, work);
}

}  // namespace modelstate
