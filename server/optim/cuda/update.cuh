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

// kWidth elements from `at` on.
template <typename Rule, typename T, int kVariant, int kWidth, bool kPlain>
__device__ inline void UpdateElements(const CudaUpdateWork<T>& work, const CudaTensor<T>& tensor,
                                      const typename Rule::template Scalars<T>& scalars,
                                      uint64_t at) {
  constexpr int kSlots = static_cast<int>(std::size(Rule::kSlots));
  const bool limited = !kPlain && work.clip_value > 0;
  const T factor = limited ? T(1) : tensor.sign * work.clip_coef;
  const CudaSlot<T>& master = tensor.slots[0];
  T p[kWidth] = {}, g[kWidth] = {}, x[kSlots][kWidth] = {};
  if constexpr (kPlain) {
    Load(static_cast<const T*>(tensor.output), at, g);
    Load(static_cast<const T*>(tensor.parameter), at, p);
  } else {
    LoadGradient(tensor, work.parts, at, g);
    // The master is the parameter; the narrow one is its rounding.
    if (master.from != nullptr) {
      Load(master.from, at, p);
    } else {
      LoadAs(tensor.element, tensor.parameter, at, p);
    }
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const CudaSlot<T>& slot = tensor.slots[1 + s];
    if (kPlain && Rule::Uses(kVariant, s)) Load(static_cast<const T*>(slot.data), at, x[s]);
    if (!kPlain && slot.data != nullptr) BringSlot(slot, at, x[s]);
  }
  if (limited) {
    const GradientScalars<T> prepare = {work.clip_coef, work.clip_value, tensor.sign};
#pragma unroll
    for (int k = 0; k < kWidth; ++k) g[k] = PrepareGradient(prepare, g[k]);
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    T slots[kMaxRuleSlots] = {};
#pragma unroll
    for (int s = 0; s < kSlots; ++s) slots[s] = x[s][k];
    g[k] = Rule::template Update<T, kVariant>(scalars, p[k], g[k] * factor, slots);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) x[s][k] = slots[s];
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const CudaSlot<T>& slot = tensor.slots[1 + s];
    // One that this variant does not use is carried along where the state moves.
    const bool writes = Rule::Uses(kVariant, s) || (!kPlain && slot.data != slot.from);
    if (writes && (kPlain || slot.data != nullptr)) Store(x[s], slot.data, at);
  }
  if constexpr (kPlain) {
    Store(g, static_cast<T*>(tensor.output), at);
  } else {
    if (master.data != nullptr) Store(g, master.data, at);
    StoreAs(tensor.element, g, tensor.output, at);
  }
}

// Two thread blocks at once are asked for; left alone, the compiler would have more of them, with
// registers spilled.
template <typename Rule, typename T, int kVariant, bool kPlain>
__global__ void __launch_bounds__(kCudaThreads, 2) UpdateKernel(CudaUpdateWork<T> work) {
  ForEachBlock(work, [&](CudaBlock block) {
    const CudaTensor<T>& listed = work.tensors[block.tensor];
    // By value: what a plain one points to stays in registers over the loop's stores.
    const std::conditional_t<kPlain, const CudaTensor<T>, const CudaTensor<T>&> tensor = listed;
    const auto scalars = LoadScalars<Rule, T>(work.scalars + tensor.scalars * kMaxRuleScalars);
    const uint64_t begin = block.block * kCudaBlockElements;
    ForEachElement<kCudaWidth<T>>(
        begin, BlockEnd(begin, tensor.elements), tensor.vectors,
        [&](uint64_t at) {
          UpdateElements<Rule, T, kVariant, kCudaWidth<T>, kPlain>(work, tensor, scalars, at);
        },
        [&](uint64_t at) {
          UpdateElements<Rule, T, kVariant, 1, kPlain>(work, tensor, scalars, at);
        });
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
