#ifndef MODELSTATE_SERVER_OPTIM_CUDA_UPDATE_CUH_
#define MODELSTATE_SERVER_OPTIM_CUDA_UPDATE_CUH_

#include <iterator>
#include <type_traits>
#include <utility>

#include "server/optim/cuda/elements.cuh"
#include "server/optim/cuda/launch_rule.h"
#include "server/rules/rule.h"

// The kernel of every rule. Each rule's own file instantiates it.
namespace modelstate {

template <typename Rule, typename T>
__device__ inline typename Rule::template Scalars<T> LoadScalars(const T* values) {
  using Scalars = typename Rule::template Scalars<T>;
  union {
    T values[sizeof(Scalars) / sizeof(T)];
    Scalars scalars;
  } both;
#pragma unroll
  for (size_t i = 0; i < sizeof(Scalars) / sizeof(T); ++i) both.values[i] = values[i];
  return both.scalars;
}

template <int kWidth, typename T>
__device__ inline void BringSlot(const CudaSlot<T>& slot, uint64_t at, T (&to)[kWidth]) {
  if (slot.from != nullptr) return Load(slot.from, at, to);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) to[k] = slot.initial;
}

// What a thread holds of kWidth elements: parameter, gradient, slots.
template <typename Rule, typename T, int kWidth>
struct HeldElements {
  static constexpr int kSlots = static_cast<int>(std::size(Rule::kSlots));
  T p[kWidth] = {};
  T g[kWidth] = {};
  T x[kSlots][kWidth] = {};
};

template <typename Rule, int kVariant, bool kPlain, typename T, int kWidth>
__device__ inline void FetchState(const CudaTensor<T>& tensor, uint64_t at,
                                  HeldElements<Rule, T, kWidth>& held) {
#pragma unroll
  for (int s = 0; s < held.kSlots; ++s) {
    const CudaSlot<T>& slot = tensor.slots[1 + s];
    if (kPlain && Rule::Uses(kVariant, s)) {
      Load(static_cast<const T*>(slot.data), at, held.x[s]);
    }
    if (!kPlain && slot.data != nullptr) BringSlot(slot, at, held.x[s]);
  }
  // The master is the parameter; the narrow one is its rounding.
  if (const CudaSlot<T>& master = tensor.slots[0]; kPlain) {
    Load(static_cast<const T*>(tensor.parameter), at, held.p);
  } else if (master.from != nullptr) {
    Load(master.from, at, held.p);
  } else {
    LoadAs(tensor.element, tensor.parameter, at, held.p);
  }
}

template <bool kPlain, typename Rule, typename T, int kWidth>
__device__ inline void FetchGradient(const CudaUpdateWork<T>& work, const CudaTensor<T>& tensor,
                                     uint64_t at, HeldElements<Rule, T, kWidth>& held) {
  if constexpr (kPlain) {
    Load(static_cast<const T*>(tensor.output), at, held.g);
  } else {
    LoadGradient(tensor, work.parts, at, held.g);
  }
}

template <typename Rule, int kVariant, bool kPlain, typename T, int kWidth>
__device__ inline void Update(const CudaUpdateWork<T>& work, const CudaTensor<T>& tensor,
                              const typename Rule::template Scalars<T>& scalars,
                              HeldElements<Rule, T, kWidth>& held) {
  const bool limited = !kPlain && work.clip_value > 0;
  const T factor = limited ? T(1) : tensor.sign * work.clip_coef;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    T slots[kMaxRuleSlots] = {};
#pragma unroll
    for (int s = 0; s < held.kSlots; ++s) slots[s] = held.x[s][k];
    T g = held.g[k];
    if (limited) {
      const GradientScalars<T> prepare = {work.clip_coef, work.clip_value, tensor.sign};
      g = PrepareGradient(prepare, g);
    }
    held.g[k] = Rule::template Update<T, kVariant>(scalars, held.p[k], g * factor, slots);
#pragma unroll
    for (int s = 0; s < held.kSlots; ++s) held.x[s][k] = slots[s];
  }
}

template <typename Rule, int kVariant, bool kPlain, typename T, int kWidth>
__device__ inline void Keep(const CudaTensor<T>& tensor, uint64_t at,
                            const HeldElements<Rule, T, kWidth>& held) {
#pragma unroll
  for (int s = 0; s < held.kSlots; ++s) {
    const CudaSlot<T>& slot = tensor.slots[1 + s];
    // One that this variant does not use is carried along where the state moves.
    const bool writes = Rule::Uses(kVariant, s) || (!kPlain && slot.data != slot.from);
    if (writes && (kPlain || slot.data != nullptr)) Store(held.x[s], slot.data, at);
  }
  if constexpr (kPlain) {
    Store(held.g, static_cast<T*>(tensor.output), at);
  } else {
    if (T* master = tensor.slots[0].data; master != nullptr) Store(held.g, master, at);
    StoreAs(tensor.element, held.g, tensor.output, at);
  }
}

// How many groups of elements a thread fetches before it updates the first: enough to keep the
// memory busy, few enough for its registers.
template <typename Rule, typename T, int kVariant, bool kPlain>
constexpr int Groups() {
  const bool all_slots = std::size(Rule::kSlots) == 3 && Rule::Uses(kVariant, 2);
  if (!kPlain) return 1;
  return !all_slots && sizeof(T) == 4 ? 4 : 2;
}

// Two thread blocks at once are asked for; left alone, the compiler would have more of them, with
// registers spilled.
template <typename Rule, typename T, int kVariant, bool kPlain>
__global__ void __launch_bounds__(kCudaThreads, 2) UpdateKernel(CudaUpdateWork<T> work) {
  constexpr int kWidth = kCudaWidth<T>;
  constexpr int kCount = Groups<Rule, T, kVariant, kPlain>();
  ForEachBlock(work, [&](CudaBlock block) {
    const CudaTensor<T>& listed = work.tensors[block.tensor];
    // By value: what a plain one points to stays in registers over the loop's stores.
    const std::conditional_t<kPlain, const CudaTensor<T>, const CudaTensor<T>&> tensor = listed;
    const auto scalars = LoadScalars<Rule, T>(work.scalars + tensor.scalars * kMaxRuleScalars);
    const uint64_t begin = block.block * kCudaBlockElements;
    const unsigned n = static_cast<unsigned>(BlockEnd(begin, tensor.elements) - begin);
    const unsigned whole = tensor.vectors ? n / kWidth * kWidth : 0;
    const unsigned stride = blockDim.x * kWidth;
    for (unsigned first = threadIdx.x * kWidth; first < whole; first += stride * kCount) {
      HeldElements<Rule, T, kWidth> held[kCount];
      // Gradients last: where they are converted, a thread waits for them.
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const unsigned at = first + i * stride;
        if (at < whole) FetchState<Rule, kVariant, kPlain>(tensor, begin + at, held[i]);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const unsigned at = first + i * stride;
        if (at < whole) FetchGradient<kPlain>(work, tensor, begin + at, held[i]);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const unsigned at = first + i * stride;
        if (at >= whole) continue;
        Update<Rule, kVariant, kPlain>(work, tensor, scalars, held[i]);
        Keep<Rule, kVariant, kPlain>(tensor, begin + at, held[i]);
      }
    }
#pragma unroll 1
    for (unsigned at = whole + threadIdx.x; at < n; at += blockDim.x) {
      HeldElements<Rule, T, 1> held;
      FetchState<Rule, kVariant, kPlain>(tensor, begin + at, held);
      FetchGradient<kPlain>(work, tensor, begin + at, held);
      Update<Rule, kVariant, kPlain>(work, tensor, scalars, held);
      Keep<Rule, kVariant, kPlain>(tensor, begin + at, held);
    }
  });
}

template <typename Rule, typename T, int... kVariants>
auto KernelOf(std::integer_sequence<int, kVariants...>, CudaVariant variant) {
  void (*kernel)(CudaUpdateWork<T>) = nullptr;
  (void)((kVariants == variant.variant &&
          (kernel = variant.plain ? UpdateKernel<Rule, T, kVariants, true>
                                  : UpdateKernel<Rule, T, kVariants, false>,
           true)) ||
         ...);
  return kernel;
}

template <typename Rule, typename T>
cudaError_t LaunchRule(CudaVariant variant, const CudaUpdateWork<T>& work, cudaStream_t stream) {
  const auto kernel =
      KernelOf<Rule, T>(std::make_integer_sequence<int, Rule::kVariants>(), variant);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return LaunchOverBlocks(kernel, work.block_count, stream, work);
}

#define MODELSTATE_CUDA_RULE(Rule)                                                          \
  template cudaError_t LaunchRule<Rule, float>(CudaVariant, const CudaUpdateWork<float>&,   \
                                               cudaStream_t);                               \
  template cudaError_t LaunchRule<Rule, double>(CudaVariant, const CudaUpdateWork<double>&, \
                                                cudaStream_t)

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_UPDATE_CUH_
