#include "server/optim/cuda/elements.cuh"
#include "server/optim/cuda/kernels.h"

namespace modelstate {
namespace {

// The CPU's SumOfSquares: four places of a block are read at once, each into 16 lanes. Here 16
// threads have four neighbouring lanes each, so a thread block computes several blocks.
constexpr int kLanes = 4;
constexpr int kLaneThreads = 16;
constexpr int kAtOnce = kCudaThreads / kLaneThreads;

template <typename T>
struct LaneSums {
  double sums[kLanes] = {};
  bool finite = true;

  __device__ void Add(int lane, T value) {
    const double x = static_cast<double>(value);
    sums[lane] += x * x;
    // x - x is 0 for finite x only. Squares of large doubles overflow; what is not finite among
    // floats shows in their sum.
    if constexpr (sizeof(T) == 8) finite &= x - x == 0;
  }
};

template <typename T>
__device__ void AddLanes(const T (&values)[kLanes], LaneSums<T>* lanes) {
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) lanes->Add(lane, values[lane]);
}

// Over the first elements of a thread's lanes, in their order.
template <typename T>
__device__ void AddPlaces(const CudaTensor<T>& tensor, const CudaPart<T>* parts, uint64_t first,
                          int stride, LaneSums<T>* lanes) {
  T values[kLanes];
  if (tensor.in_place && tensor.vectors) {
    const T* gradient = static_cast<const T*>(tensor.output);
#pragma unroll 8
    for (int i = 0; i < stride; i += 16) {
      Load(gradient, first + i, values);
      AddLanes(values, lanes);
    }
    return;
  }
  if (tensor.vectors && tensor.part_count == 1) {
    const CudaPart<T> part = parts[tensor.first_part];
    WithCudaCodec<T>(part.element, [&](auto codec) {
      using Codec = decltype(codec);
#pragma unroll 4
      for (int i = 0; i < stride; i += 16) {
        const auto pack = LoadPack<kLanes, typename Codec::Stored>(part.data, first + i);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          values[lane] = static_cast<T>(Codec::Load(pack.values[lane])) * part.inverse_scale *
                         part.coefficient;
        }
        AddLanes(values, lanes);
      }
    });
    return;
  }
#pragma unroll 1
  for (int i = 0; i < stride; i += 16) {
    if (tensor.vectors) {
      LoadGradient(tensor, parts, first + i, values);
    } else {
#pragma unroll 1
      for (int lane = 0; lane < kLanes; ++lane) {
        T value[1];
        LoadGradient(tensor, parts, first + i + lane, value);
#pragma unroll
        for (int k = 0; k < kLanes; ++k) values[k] = k == lane ? value[0] : values[k];
      }
    }
    AddLanes(values, lanes);
  }
}

template <typename T>
__device__ void BlockNormOf(const CudaNormWork<T>& work, uint64_t index, int thread,
                            unsigned team) {
  const CudaBlock block = work.blocks[index];
  const CudaTensor<T>& tensor = work.tensors[block.tensor];
  const uint64_t begin = block.block * kCudaBlockElements;
  const int n = static_cast<int>(BlockEnd(begin, tensor.elements) - begin);
  const int stride = n / 64 * 16;  // elements of a place
  const uint64_t first = begin + thread / 4 * stride + thread % 4 * kLanes;
  LaneSums<T> lanes;
  AddPlaces(tensor, work.parts, first, stride, &lanes);
  const int rest = n - 4 * stride - thread * kLanes;  // of this thread's lanes
#pragma unroll 1
  for (int i = 0; i < kLanes && i < rest; ++i) {
    T value[1];
    LoadGradient(tensor, work.parts, begin + 4 * stride + thread * kLanes + i, value);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane == i) lanes.Add(lane, value[0]);
    }
  }
  // The tree over 64 lanes: down to four between threads, then within the first.
  for (int width = kLaneThreads / 2; width > 0; width /= 2) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes.sums[lane] += __shfl_down_sync(team, lanes.sums[lane], width, kLaneThreads);
    }
    lanes.finite &=
        __shfl_down_sync(team, static_cast<int>(lanes.finite), width, kLaneThreads) != 0;
  }
  if (thread != 0) return;
  const double sum = (lanes.sums[0] + lanes.sums[2]) + (lanes.sums[1] + lanes.sums[3]);
  const bool finite = sizeof(T) == 8 ? lanes.finite : sum - sum == 0;
  work.norms[index] = {sum, finite};
}

template <typename T>
__global__ void __launch_bounds__(kCudaThreads, 2) NormKernel(CudaNormWork<T> work) {
  const int thread = threadIdx.x % kLaneThreads;
  // The half of the warp that computes the same block: the other may have none.
  const unsigned team = 0xFFFFu << (threadIdx.x & 16u);
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kAtOnce + threadIdx.x / kLaneThreads;
       i < work.block_count; i += static_cast<uint64_t>(gridDim.x) * kAtOnce) {
    BlockNormOf(work, i, thread, team);
  }
}

template <typename T>
cudaError_t Launch(const CudaNormWork<T>& work, cudaStream_t stream) {
  return LaunchOverBlocks(NormKernel<T>, (work.block_count + kAtOnce - 1) / kAtOnce, stream, work);
}

}  // namespace

cudaError_t LaunchNorm(const CudaNormWork<float>& work, cudaStream_t stream) {
  return Launch(work, stream);
}

cudaError_t LaunchNorm(const CudaNormWork<double>& work, cudaStream_t stream) {
  return Launch(work, stream);
}

}  // namespace modelstate
