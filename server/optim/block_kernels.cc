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

template <typename Codec, typename T>
[[gnu::flatten]] void LoadLoop(const void* from, uint64_t begin, size_t n, T* __restrict__ to) {
  const auto* stored = static_cast<const typename Codec::Stored*>(from) + begin;
  for (size_t i = 0; i < n; ++i) to[i] = static_cast<T>(Codec::Load(stored[i]));
}

template <typename T>
void Load(DType dtype, const void* from, uint64_t begin, size_t n, T* to) {
  WithCodec(dtype, [&](auto codec) { LoadLoop<decltype(codec), T>(from, begin, n, to); });
}

template <typename Codec, typename T>
[[gnu::flatten]] void StoreLoop(const T* __restrict__ from, uint64_t begin, size_t n, void* to) {
  auto* stored = static_cast<typename Codec::Stored*>(to) + begin;
  for (size_t i = 0; i < n; ++i) {
    stored[i] = Codec::Store(static_cast<typename Codec::Computed>(from[i]));
  }
}

template <typename T>
void Store(DType dtype, const T* from, uint64_t begin, size_t n, void* to) {
  WithCodec(dtype, [&](auto codec) { StoreLoop<decltype(codec), T>(from, begin, n, to); });
}

template <typename T>
[[gnu::flatten]] void Scale(T* __restrict__ values, size_t n, T factor) {
  for (size_t i = 0; i < n; ++i) values[i] = values[i] * factor;
}

template <typename T>
[[gnu::flatten]] void AddScaled(const T* __restrict__ from, size_t n, T factor,
                                T* __restrict__ to) {
  for (size_t i = 0; i < n; ++i) to[i] = to[i] + from[i] * factor;
}

template <typename T>
void LoadPart(const GradientPart& part, uint64_t begin, size_t n, T* to) {
  Load(part.dtype, part.data, begin, n, to);
  if (part.inverse_scale != 1) Scale(to, n, static_cast<T>(part.inverse_scale));
}

// The mean of the parts, at most kChunk elements.
template <typename T>
void LoadGradient(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, size_t n, T* to) {
  T other[kChunk];
  for (uint32_t k = 0; k < tensor.part_count; ++k) {
    const GradientPart& part = plan.parts[tensor.first_part + k];
    const T coefficient = static_cast<T>(part.coefficient);
    if (k == 0) {
      LoadPart(part, begin, n, to);
      if (coefficient != 1) Scale(to, n, coefficient);
    } else {
      LoadPart(part, begin, n, other);
      AddScaled(other, n, coefficient, to);
    }
  }
}

template <typename T>
[[gnu::flatten]] BlockNorm SumOfSquares(const T* g, size_t n) {
  constexpr size_t kLanes = 16;
  double sums[kLanes] = {};
  // x - x is 0 for finite x only; a difference that is not survives every later addition.
  T residue[kLanes] = {};
  const size_t whole = n / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const T x = g[i + lane];
      residue[lane] += x - x;
      sums[lane] += static_cast<double>(x) * static_cast<double>(x);
    }
  }
  for (size_t lane = 0; whole + lane < n; ++lane) {
    const T x = g[whole + lane];
    residue[lane] += x - x;
    sums[lane] += static_cast<double>(x) * static_cast<double>(x);
  }
  for (size_t width = kLanes / 2; width > 0; width /= 2) {
    for (size_t lane = 0; lane < width; ++lane) {
      sums[lane] += sums[lane + width];
      residue[lane] += residue[lane + width];
    }
  }
  return {sums[0], residue[0] == 0};
}

template <typename T>
BlockNorm NormOf(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  if (tensor.in_place) {
    return SumOfSquares(reinterpret_cast<const T*>(tensor.output) + begin, end - begin);
  }
  T values[kBlockElements];
  for (uint64_t at = begin; at < end; at += kChunk) {
    const size_t n = end - at < kChunk ? end - at : kChunk;
    LoadGradient(plan, tensor, at, n, values + (at - begin));
  }
  return SumOfSquares(values, end - begin);
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

// `g` the prepared gradient, which becomes the new parameter.
template <typename Rule, typename T, int kVariant>
[[gnu::flatten]] void RuleLoop(const typename Rule::template Scalars<T>& scalars,
                               const T* __restrict__ p, T* __restrict__ g, T* const* slots,
                               size_t n) {
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
    g[i] = Rule::template Update<T, kVariant>(s, p[i], g[i], x);
    if constexpr (kUses0) slot0[i] = x[0];
    if constexpr (kUses1) slot1[i] = x[1];
    if constexpr (kUses2) slot2[i] = x[2];
  }
}

template <typename Rule, typename T, int... kVariants>
void RunVariant(int variant, std::integer_sequence<int, kVariants...>, const RuleScalars& values,
                const T* p, T* g, T* const* slots, size_t n) {
  const auto scalars = RoundScalars<Rule, T>(values);
  (void)((kVariants == variant && (RuleLoop<Rule, T, kVariants>(scalars, p, g, slots, n), true)) ||
         ...);
}

template <typename T>
void RunRule(const StepPlan& plan, const TensorStep& tensor, const Hyperparameters& h, const T* p,
             T* g, uint64_t begin, size_t n) {
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
                        plan.scalars[tensor.scalars], p, g, slots, n);
  });
}

template <typename Codec>
void UpdateOf(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  using T = typename Codec::Computed;
  constexpr bool kNarrow = !std::is_same_v<typename Codec::Stored, T>;
  const Hyperparameters& h = plan.options->hyperparameters[tensor.group];
  const GradientScalars<T> prepare = {static_cast<T>(plan.clip_coef),
                                      static_cast<T>(plan.clip_value), *h.maximize ? T(-1) : T(1)};
  const bool prepared = prepare.clip_coef == 1 && prepare.clip_value == 0 && prepare.sign == 1;
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
    if (!prepared) Prepare(prepare, n, g);
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
    RunRule(plan, tensor, h, p, g, at, n);
    if (master != nullptr) std::memcpy(master, g, n * sizeof(T));
    if (!tensor.in_place) StoreLoop<Codec, T>(g, at, n, tensor.output);
  }
}

template <typename T>
void AccumulateOf(const GradientPart& from, T* to, bool add, uint64_t begin, uint64_t end) {
  T values[kChunk];
  for (uint64_t at = begin; at < end; at += kChunk) {
    const size_t n = end - at < kChunk ? end - at : kChunk;
    LoadPart(from, at, n, values);
    if (add) {
      AddScaled(values, n, T(1), to + at);
    } else {
      std::memcpy(to + at, values, n * sizeof(T));
    }
  }
}

BlockNorm Norm(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end) {
  const DefaultArithmetic arithmetic;
  return tensor.dtype == DType::kF64 ? NormOf<double>(plan, tensor, begin, end)
                                     : NormOf<float>(plan, tensor, begin, end);
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
const BlockKernels kKernels = {Norm, Update, Accumulate};

}  // namespace modelstate::MODELSTATE_KERNELS
