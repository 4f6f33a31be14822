#include "server/optim/cuda/elements.cuh"
#include "server/optim/cuda/kernels.h"

namespace modelstate {
namespace {

// Joins of so few are done by one thread each, others by a thread block.
constexpr uint64_t kFew = 16;

__device__ CudaBlockNorm Both(const CudaBlockNorm& a, const CudaBlockNorm& b) {
  return {a.sum_of_squares + b.sum_of_squares, a.finite & b.finite};
}

// TreeSum, in place.
__device__ CudaBlockNorm JoinFew(CudaBlockNorm* norms, uint64_t count) {
  if (count == 0) return {0, 1};
  for (uint64_t n = count; n > 1; n = (n + 1) / 2) {
    for (uint64_t i = 0; i < n / 2; ++i) norms[i] = Both(norms[2 * i], norms[2 * i + 1]);
    if (n % 2 != 0) norms[n / 2] = norms[n - 1];
  }
  return norms[0];
}

__global__ void __launch_bounds__(kCudaThreads) JoinFewKernel(CudaJoinWork work) {
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < work.join_count; i += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
    const CudaJoin join = work.joins[i];
    if (join.count <= kFew) work.results[i] = JoinFew(work.norms + join.first, join.count);
  }
}

// Level by level, each from one memory into the other.
__global__ void __launch_bounds__(kCudaThreads) JoinManyKernel(CudaJoinWork work) {
  for (uint64_t i = blockIdx.x; i < work.join_count; i += gridDim.x) {
    const CudaJoin join = work.joins[i];
    if (join.count <= kFew) continue;
    CudaBlockNorm* from = work.norms + join.first;
    CudaBlockNorm* to = work.scratch + join.first;
    for (uint64_t n = join.count; n > 1; n = (n + 1) / 2) {
#pragma unroll 4
      for (uint64_t k = threadIdx.x; k < n / 2; k += blockDim.x) {
        to[k] = Both(from[2 * k], from[2 * k + 1]);
      }
      if (n % 2 != 0 && threadIdx.x == 0) to[n / 2] = from[n - 1];
      __syncthreads();
      CudaBlockNorm* const written = to;
      to = from;
      from = written;
    }
    if (threadIdx.x == 0) work.results[i] = from[0];
    __syncthreads();
  }
}

}  // namespace

cudaError_t LaunchJoin(const CudaJoinWork& work, cudaStream_t stream) {
  const uint64_t at_once = (work.join_count + kCudaThreads - 1) / kCudaThreads;
  const cudaError_t error = LaunchOverBlocks(JoinFewKernel, at_once, stream, work);
  return error != cudaSuccess ? error
                              : LaunchOverBlocks(JoinManyKernel, work.join_count, stream, work);
}

}  // namespace modelstate
