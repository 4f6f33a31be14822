// Compiled once for each instruction set, into a namespace of its own. What is not inlined here
// must have a name of its own too: a function of a shared header that two of the objects hold would
// be kept once, and run on a machine that lacks its instructions. (KernelObjects.* looks.)
#include "server/optim/block_kernels.h"

#include <cstring>
#include <type_traits>
#include <utility>

#include "common/base/float_cast.h"
#include "server/optim/default_arithmetic.h"
#include "server/rules/rules.h"

namespace modelstate::MODELSTATE_KERNELS {
namespace {

// Elements that are brought through the nearest cache together.
constexpr uint64_t kChunk = 2048;
static_assert(kBlockElements % kChunk == 0);

// How the elements of a dtype are stored and in what type they are computed.
template <typename T>
struct WideCodec {
  using Stored = T;
  using Computed = T;
  static T Load(T value) { return value; }
  static T Store(T value) { return value; }
};
template <typename StoredT, float (*kLoad)(StoredT), StoredT (*kStore)(float)>
struct NarrowCodec {
  using Stored = StoredT;
  using Computed = float;
  static float Load(StoredT value) { return kLoad(value); }
  static StoredT Store(float value) { return kStore(value); }
};
using F16Codec = NarrowCodec<uint16_t, HalfToFloat, FloatToHalf>;
using BF16Codec = NarrowCodec<uint16_t, BFloat16ToFloat, FloatToBFloat16>;
using F8E4M3Codec = NarrowCodec<uint8_t, F8E4M3ToFloat, FloatToF8E4M3>;
using F8E5M2Codec = NarrowCodec<uint8_t, F8E5M2ToFloat, FloatToF8E5M2>;

template <typename Function>
void WithCodec(DType dtype, Function function) {
  switch (dtype) {
    case DType::kF64:
      return function(WideCodec<double>());
    case DType::kF16:
      return function(F16Codec());
    case DType::kBF16:
      return function(BF16Codec());
    case DType::kF8E4M3:
      return function(F8E4M3Codec());
    case DType::kF8E5M2:
      return function(F8E5M2Codec());
    default:  // a plan holds real floating-point elements only
      return function(WideCodec<float>());
  }
}

// An element that arrived in the middle of other bytes.
template <typename T>
struct [[gnu::packed]] Unaligned {
  T value;
};

template <typename Codec, typename T>
[[gnu::flatten]] void LoadLoop(const void* from, uint64_t begin, size_t n, T* __restrict__ to) {
  const auto* stored = static_cast<const typename Codec::Stored*>(from) + begin;
  for (size_t i = 0; i < n; ++i) to[i] = static_cast<T>(Codec::Load(stored[i]));
}

template <typename Codec, typename T>
[[gnu::flatten]] void StoreLoop(const T* __restrict__ from, uint64_t begin, size_t n, void* to) {
  auto* stored = static_cast<typename Codec::Stored*>(to) + begin;
  for (size_t i = 0; i < n; ++i) {
    stored[i] = Codec::Store(static_cast<typename Codec::Computed>(from[i]));
  }
}

template <typename T>
struct PartScalars {
  T inverse_scale;
  T coefficient;
};

// Sets `to` to one part's share of the mean, or adds it.
template <typename Codec, typename T, bool kAdd>
[[gnu::flatten]] void ShareLoop(const void* from, uint64_t begin, size_t n,
                                const PartScalars<T>& scalars, T* __restrict__ to) {
  const auto* stored = static_cast<const Unaligned<typename Codec::Stored>*>(from) + begin;
  const PartScalars<T> s = scalars;
  for (size_t i = 0; i < n; ++i) {
    const T share = static_cast<T>(Codec::Load(stored[i].value)) * s.inverse_scale * s.coefficient;
    to[i] = kAdd ? to[i] + share : share;
  }
}

template <typename T, bool kAdd>
void Share(const GradientPart& part, uint64_t begin, size_t n, T* to) {
  const PartScalars<T> scalars = {static_cast<T>(part.inverse_scale),
                                  static_cast<T>(part.coefficient)};
  WithCodec(part.dtype, [&](auto codec) {
    ShareLoop<decltype(codec), T, kAdd>(part.data, begin, n, scalars, to);
  });
}

// The mean of the parts.
template <typename T>
void LoadGradient(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, size_t n, T* to) {
  Share<T, false>(plan.parts[tensor.first_part], begin, n, to);
  for (uint32_t k = 1; k < tensor.part_count; ++k) {
    Share<T, true>(plan.parts[tensor.first_part + k], begin, n, to);
  }
}

// x - x is 0 for finite x only.
template <typename T>
[[gnu::flatten]] bool AllFinite(const Unaligned<T>* g, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (g[i].value - g[i].value != 0) return false;
  }
  return true;
}

// Reads in four places at once: one alone does not keep the memory busy.
template <typename T>
[[gnu::flatten]] BlockNorm SumOfSquares(const void* from, size_t n) {
  const auto* g = static_cast<const Unaligned<T>*>(from);
  constexpr size_t kPlaces = 4;
  constexpr size_t kLanes = 16;
  double sums[kPlaces * kLanes] = {};
  const size_t stride = n / (kPlaces * kLanes) * kLanes;
  for (size_t i = 0; i < stride; i += kLanes) {
    for (size_t place = 0; place < kPlaces; ++place) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const double x = static_cast<double>(g[place * stride + i + lane].value);
        sums[place * kLanes + lane] += x * x;
      }
    }
  }
  const Unaligned<T>* rest = g + kPlaces * stride;
  for (size_t i = 0; i < n - kPlaces * stride; ++i) {
    const double x = static_cast<double>(rest[i].value);
    sums[i] += x * x;
  }
  for (size_t width = kPlaces * kLanes / 2; width > 0; width /= 2) {
    for (size_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  // What is not finite shows in the sum; but squares of large doubles overflow too.
  const double sum = sums[0];
  return {sum, sum - sum == 0 || AllFinite(g, n)};
}

// The next tensor's gradient, while this one's is summed: from one short tensor to the next the
// hardware does not look ahead.
void PrefetchNext(const StepPlan& plan, const TensorStep& tensor) {
  constexpr uint64_t kBytes = 4096;
  const TensorStep* next = &tensor + 1;
  if (next == plan.tensors.end()) return;
  const uint64_t bytes = next->elements < kBytes / 4 ? next->elements * 4 : kBytes;
  for (uint64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next->output + at, 0, 2);
}

template <typename T>
BlockNorm NormOf(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  if (tensor.in_place) {
    if (end == tensor.elements) PrefetchNext(plan, tensor);
    return SumOfSquares<T>(reinterpret_cast<const T*>(tensor.output) + begin, end - begin);
  }
  T values[kBlockElements];
  LoadGradient(plan, tensor, begin, end - begin, values);
  return SumOfSquares<T>(values, end - begin);
}

template <typename T>
BlockNorm PartNormOf(const GradientPart& part, size_t n) {
  constexpr DType kComputed = std::is_same_v<T, double> ? DType::kF64 : DType::kF32;
  if (part.dtype == kComputed && part.inverse_scale == 1) return SumOfSquares<T>(part.data, n);
  T values[kBlockElements];
  Share<T, false>(part, 0, n, values);
  return SumOfSquares<T>(values, n);
}

template <typename T>
[[gnu::flatten]] void Prepare(const GradientScalars<T>& scalars, size_t n, T* __restrict__ g) {
  const GradientScalars<T> s = scalars;
  for (size_t i = 0; i < n; ++i) g[i] = PrepareGradient(s, g[i]);
}

template <typename T>
[[gnu::flatten]] void Fill(T* to, size_t n, T value) {
  for (size_t i = 0; i < n; ++i) to[i] = value;
}

// The values of a slot, where this step writes them.
template <typename T>
T* BringSlot(const PlannedSlot& slot, uint64_t begin, size_t n) {
  if (slot.data == nullptr) return nullptr;
  T* data = reinterpret_cast<T*>(slot.data) + begin;
  if (slot.from == nullptr) {
    Fill(data, n, static_cast<T>(slot.initial));
  } else if (slot.from != slot.data) {
    std::memcpy(data, reinterpret_cast<const T*>(slot.from) + begin, n * sizeof(T));
  }
  return data;
}

template <typename Rule, typename T>
typename Rule::template Scalars<T> RoundScalars(const RuleScalars& values) {
  constexpr size_t kCount = sizeof(typename Rule::template Scalars<T>) / sizeof(T);
  T rounded[kCount];
  for (size_t i = 0; i < kCount; ++i) rounded[i] = static_cast<T>(values[i]);
  typename Rule::template Scalars<T> scalars;
  static_assert(sizeof(scalars) == sizeof(rounded));
  std::memcpy(&scalars, rounded, sizeof(scalars));
  return scalars;
}

// The gradient is g * factor; `g` becomes the new parameter. Not inlined, so that KernelObjects.*
// can look at each rule's loop by itself.
template <typename Rule, typename T, int kVariant>
[[gnu::flatten, gnu::noinline]] void RuleLoop(const typename Rule::template Scalars<T>& scalars,
                                              T factor, const T* __restrict__ p, T* __restrict__ g,
                                              T* const* slots, size_t n) {
  const typename Rule::template Scalars<T> s = scalars;
  T* __restrict__ slot0 = slots[0];
  T* __restrict__ slot1 = slots[1];
  T* __restrict__ slot2 = slots[2];
  constexpr size_t kSlots = sizeof(Rule::kSlots) / sizeof(Rule::kSlots[0]);
  constexpr bool kUses0 = kSlots > 0 && Rule::Uses(kVariant, 0);
  constexpr bool kUses1 = kSlots > 1 && Rule::Uses(kVariant, 1);
  constexpr bool kUses2 = kSlots > 2 && Rule::Uses(kVariant, 2);
  for (size_t i = 0; i < n; ++i) {
    T x[kMaxRuleSlots] = {};
    if constexpr (kUses0) x[0] = slot0[i];
    if constexpr (kUses1) x[1] = slot1[i];
    if constexpr (kUses2) x[2] = slot2[i];
    g[i] = Rule::template Update<T, kVariant>(s, p[i], g[i] * factor, x);
    if constexpr (kUses0) slot0[i] = x[0];
    if constexpr (kUses1) slot1[i] = x[1];
    if constexpr (kUses2) slot2[i] = x[2];
  }
}

template <typename Rule, typename T, int... kVariants>
void RunVariant(int variant, std::integer_sequence<int, kVariants...>, const RuleScalars& values,
                T factor, const T* p, T* g, T* const* slots, size_t n) {
  const auto scalars = RoundScalars<Rule, T>(values);
  (void)((kVariants == variant &&
          (RuleLoop<Rule, T, kVariants>(scalars, factor, p, g, slots, n), true)) ||
         ...);
}

template <typename T>
void RunRule(const StepPlan& plan, const TensorStep& tensor, const Hyperparameters& h, T factor,
             const T* p, T* g, uint64_t begin, size_t n) {
  T* slots[kMaxRuleSlots];
  for (size_t i = 0; i < kMaxRuleSlots; ++i) {
    slots[i] = BringSlot<T>(tensor.slots[kMasterPlace + 1 + i], begin, n);
  }
  const PlannedSlot& first = tensor.slots[kMasterPlace + 1];
  const bool begins = first.data != nullptr && first.from == nullptr;
  AllRules::Visit(plan.algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    RunVariant<Rule, T>(Rule::Variant(h, begins),
                        std::make_integer_sequence<int, Rule::kVariants>(),
                        plan.scalars[tensor.scalars], factor, p, g, slots, n);
  });
}

template <typename Codec>
void UpdateOf(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  using T = typename Codec::Computed;
  constexpr bool kNarrow = !std::is_same_v<typename Codec::Stored, T>;
  const Hyperparameters& h = plan.options->hyperparameters[tensor.group];
  const GradientScalars<T> prepare = {static_cast<T>(plan.clip_coef),
                                      static_cast<T>(plan.clip_value), *h.maximize ? T(-1) : T(1)};
  // Without a limit for elements, preparing is a multiplication: exact for 1 and for -1.
  const bool limited = prepare.clip_value > 0;
  const T factor = limited ? T(1) : prepare.sign * prepare.clip_coef;
  T values[kChunk];
  T rounded[kNarrow ? kChunk : 1];
  for (uint64_t at = begin; at < end; at += kChunk) {
    const size_t n = end - at < kChunk ? end - at : kChunk;
    T* g = values;
    if (tensor.in_place) {
      g = reinterpret_cast<T*>(tensor.output) + at;
    } else {
      LoadGradient(plan, tensor, at, n, g);
    }
    if (limited) Prepare(prepare, n, g);
    const T* p = nullptr;
    T* master = nullptr;
    if constexpr (kNarrow) {
      // The master is the parameter; the narrow one is its rounding.
      const PlannedSlot& slot = tensor.slots[kMasterPlace];
      master = BringSlot<T>(slot, at, n);
      T* from = master == nullptr ? rounded : master;
      if (master == nullptr || slot.from == nullptr) {
        LoadLoop<Codec, T>(tensor.parameter, at, n, from);
      }
      p = from;
    } else {
      p = reinterpret_cast<const T*>(tensor.parameter) + at;
    }
    RunRule(plan, tensor, h, factor, p, g, at, n);
    if (master != nullptr) std::memcpy(master, g, n * sizeof(T));
    if (!tensor.in_place) StoreLoop<Codec, T>(g, at, n, tensor.output);
  }
}

template <typename T>
void AccumulateOf(const GradientPart& from, T* to, bool add, uint64_t begin, uint64_t end) {
  if (add) return Share<T, true>(from, begin, end - begin, to + begin);
  T values[kChunk];
  for (uint64_t at = begin; at < end; at += kChunk) {
    const size_t n = end - at < kChunk ? end - at : kChunk;
    Share<T, false>(from, at, n, values);
    std::memcpy(to + at, values, n * sizeof(T));
  }
}

BlockNorm Norm(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  const DefaultArithmetic arithmetic;
  return tensor.dtype == DType::kF64 ? NormOf<double>(plan, tensor, begin, end)
                                     : NormOf<float>(plan, tensor, begin, end);
}

BlockNorm PartNorm(const GradientPart& part, bool wide, size_t n) {
  const DefaultArithmetic arithmetic;
  return wide ? PartNormOf<double>(part, n) : PartNormOf<float>(part, n);
}

void Update(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  const DefaultArithmetic arithmetic;
  WithCodec(tensor.dtype, [&](auto codec) { UpdateOf<decltype(codec)>(plan, tensor, begin, end); });
}

void Accumulate(const GradientPart& from, uint8_t* to, bool wide, bool add, uint64_t begin,
                uint64_t end) {
  const DefaultArithmetic arithmetic;
  if (wide) {
    AccumulateOf(from, reinterpret_cast<double*>(to), add, begin, end);
  } else {
    AccumulateOf(from, reinterpret_cast<float*>(to), add, begin, end);
  }
}

}  // namespace

extern const BlockKernels kKernels;
const BlockKernels kKernels = {Norm, PartNorm, Update, Accumulate};

}  // namespace modelstate::MODELSTATE_KERNELS
