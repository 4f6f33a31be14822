#include "server/optim/cuda/elements.cuh"
#include "server/optim/cuda/kernels.h"

namespace modelstate {
namespace {

template <int kWidth, typename T>
__device__ void Accumulate(const CudaAddition<T>& addition, uint64_t at) {
  T values[kWidth] = {};
  if (addition.add) Load(static_cast<const T*>(addition.to), at, values);
  AddShare(addition.from, at, addition.add, values);
  Store(values, addition.to, at);
}

template <typename T>
__global__ void __launch_bounds__(kCudaThreads) AccumulateKernel(CudaAccumulateWork<T> work) {
  ForEachBlock(work, [&](CudaBlock block) {
    const CudaAddition<T>& addition = work.additions[block.tensor];
    const uint64_t begin = block.block * kCudaBlockElements;
    ForEachElement<kCudaWidth<T>>(
        begin, BlockEnd(begin, addition.elements), addition.vectors,
        [&](uint64_t at) { Accumulate<kCudaWidth<T>>(addition, at); },
        [&](uint64_t at) { Accumulate<1>(addition, at); });
  });
}

}  // namespace

cudaError_t LaunchAccumulate(const CudaAccumulateWork<float>& work, cudaStream_t stream) {
  return LaunchOverBlocks(AccumulateKernel<float>, work.block_count, stream, work);
}

cudaError_t LaunchAccumulate(const CudaAccumulateWork<double>& work, cudaStream_t stream) {
  return LaunchOverBlocks(AccumulateKernel<double>, work.block_count, stream, work);
}

}  // namespace modelstate
