#include "server/optim/block_update.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/base/float_cast.h"

namespace modelstate {
namespace {

// How the elements of a dtype are stored and in what type they are computed.
struct F64Codec {
  using Stored = double;
  using Computed = double;
};
struct F32Codec {
  using Stored = float;
  using Computed = float;
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

template <typename Codec>
constexpr bool kIsNarrow = !std::is_same_v<typename Codec::Stored, typename Codec::Computed>;

template <typename Function>
void WithCodec(DType dtype, Function function) {
  switch (dtype) {
    case DType::kF64:
      return function(F64Codec());
    case DType::kF16:
      return function(F16Codec());
    case DType::kBF16:
      return function(BF16Codec());
    case DType::kF8E4M3:
      return function(F8E4M3Codec());
    case DType::kF8E5M2:
      return function(F8E5M2Codec());
    default:  // the plan holds real floating-point parameters only
      return function(F32Codec());
  }
}

template <typename T, bool kScaled>
BlockNorm SumOfSquares(const T* g, size_t n, T scale) {
  constexpr size_t kLanes = 16;
  double sums[kLanes] = {};
  // x - x is 0 for finite x only; a difference that is not survives every later addition.
  T residue[kLanes] = {};
  const size_t whole = n / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const T x = kScaled ? g[i + lane] / scale : g[i + lane];
      residue[lane] += x - x;
      sums[lane] += static_cast<double>(x) * static_cast<double>(x);
    }
  }
  for (size_t lane = 0; whole + lane < n; ++lane) {
    const T x = kScaled ? g[whole + lane] / scale : g[whole + lane];
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
BlockNorm SumOfSquares(const T* g, size_t n, T scale) {
  return scale != 1 ? SumOfSquares<T, true>(g, n, scale) : SumOfSquares<T, false>(g, n, scale);
}

template <typename T>
struct SgdArguments {
  SgdScalars<T> scalars;
  const T* parameter;
  T* gradient;
  T* buffer;
  size_t count;
};

template <typename T, bool kDecay, SgdMomentum kMomentum, bool kNesterov>
void SgdLoop(const SgdArguments<T>& a) {
  const SgdScalars<T> s = a.scalars;
  const T* __restrict__ p = a.parameter;
  T* __restrict__ g = a.gradient;
  T* __restrict__ b = a.buffer;
  for (size_t i = 0; i < a.count; ++i) {
    g[i] = SgdUpdate<T, kDecay, kMomentum, kNesterov>(
        s, p[i], g[i], kMomentum == SgdMomentum::kNone ? nullptr : b + i);
  }
}

template <typename T, bool kDecay>
void SgdMomentumLoop(const SgdArguments<T>& a, bool first, bool nesterov) {
  if (a.buffer == nullptr) {
    SgdLoop<T, kDecay, SgdMomentum::kNone, false>(a);
  } else if (first) {
    nesterov ? SgdLoop<T, kDecay, SgdMomentum::kFirst, true>(a)
             : SgdLoop<T, kDecay, SgdMomentum::kFirst, false>(a);
  } else {
    nesterov ? SgdLoop<T, kDecay, SgdMomentum::kLater, true>(a)
             : SgdLoop<T, kDecay, SgdMomentum::kLater, false>(a);
  }
}

template <typename T, bool kNearStart>
void AdamWLoop(const AdamWScalars<T>& scalars, const T* __restrict__ p, T* __restrict__ g,
               T* __restrict__ m, T* __restrict__ v, size_t count) {
  const AdamWScalars<T> s = scalars;
  for (size_t i = 0; i < count; ++i) {
    g[i] = AdamWUpdate<T, kNearStart>(s, p[i], g[i], m + i, v + i);
  }
}

template <typename T>
SgdScalars<T> Round(const SgdScalars<double>& s) {
  return {static_cast<T>(s.negative_lr), static_cast<T>(s.weight_decay), static_cast<T>(s.momentum),
          static_cast<T>(s.one_minus_dampening)};
}

template <typename T>
AdamWScalars<T> Round(const AdamWScalars<double>& s) {
  const T weight1 = static_cast<T>(s.weight1);
  return {static_cast<T>(s.decay),
          weight1,
          1 - weight1,
          static_cast<T>(s.beta2),
          static_cast<T>(s.weight2),
          static_cast<T>(s.sqrt_bias2),
          static_cast<T>(s.eps),
          static_cast<T>(s.negative_step_size)};
}

// The values of a slot, where this step writes them.
template <typename T>
T* BringSlot(const PlannedSlot& slot, uint64_t begin, size_t count) {
  T* data = reinterpret_cast<T*>(slot.data) + begin;
  if (slot.from == nullptr) {
    std::memset(data, 0, count * sizeof(T));
  } else if (slot.from != slot.data) {
    std::memcpy(data, reinterpret_cast<const T*>(slot.from) + begin, count * sizeof(T));
  }
  return data;
}

// One block: `p` the parameter's values, `g` the gradient's, which become the new parameter.
template <typename T>
void UpdateValues(Algorithm algorithm, const TensorStep& tensor, const Hyperparameters& h,
                  const GradientScalars<T>& prepare, const T* p, T* g, uint64_t begin,
                  size_t count) {
  if (prepare.scale != 1 || prepare.clip_coef != 1 || prepare.sign != 1) {
    const GradientScalars<T> s = prepare;
    for (size_t i = 0; i < count; ++i) g[i] = PrepareGradient(s, g[i]);
  }
  const size_t first_slot = tensor.has_master ? 1 : 0;
  if (algorithm == Algorithm::kSgd) {
    const PlannedSlot* buffer =
        tensor.slot_count > first_slot ? &tensor.slots[first_slot] : nullptr;
    T* b = buffer == nullptr ? nullptr : BringSlot<T>(*buffer, begin, count);
    const SgdArguments<T> arguments = {Round<T>(tensor.sgd), p, g, b, count};
    const bool first = buffer != nullptr && buffer->from == nullptr;
    *h.weight_decay != 0 ? SgdMomentumLoop<T, true>(arguments, first, *h.nesterov)
                         : SgdMomentumLoop<T, false>(arguments, first, *h.nesterov);
    return;
  }
  T* m = BringSlot<T>(tensor.slots[first_slot], begin, count);
  T* v = BringSlot<T>(tensor.slots[first_slot + 1], begin, count);
  const AdamWScalars<T> scalars = Round<T>(tensor.adamw);
  scalars.weight1 < T(0.5) ? AdamWLoop<T, true>(scalars, p, g, m, v, count)
                           : AdamWLoop<T, false>(scalars, p, g, m, v, count);
}

}  // namespace

BlockNorm ComputeBlockNorm(const TensorStep& tensor, uint64_t begin, uint64_t end,
                           double grad_scale) {
  BlockNorm norm;
  const size_t count = end - begin;
  WithCodec(tensor.dtype, [&](auto codec) {
    using Codec = decltype(codec);
    using T = typename Codec::Computed;
    const auto* stored = reinterpret_cast<const typename Codec::Stored*>(tensor.gradient) + begin;
    if constexpr (kIsNarrow<Codec>) {
      T values[kBlockElements];
      for (size_t i = 0; i < count; ++i) values[i] = Codec::Load(stored[i]);
      norm = SumOfSquares<T>(values, count, static_cast<T>(grad_scale));
    } else {
      norm = SumOfSquares<T>(stored, count, static_cast<T>(grad_scale));
    }
  });
  return norm;
}

void UpdateBlocks(Algorithm algorithm, const TensorStep& tensor, const Hyperparameters& h,
                  double grad_scale, double clip_coef, uint64_t begin, uint64_t end) {
  WithCodec(tensor.dtype, [&](auto codec) {
    using Codec = decltype(codec);
    using T = typename Codec::Computed;
    using Stored = typename Codec::Stored;
    const GradientScalars<T> prepare = {static_cast<T>(grad_scale), static_cast<T>(clip_coef),
                                        *h.maximize ? T(-1) : T(1)};
    const auto* parameter = reinterpret_cast<const Stored*>(tensor.parameter);
    auto* gradient = reinterpret_cast<Stored*>(tensor.gradient);
    for (uint64_t at = begin; at < end; at += kBlockElements) {
      const size_t count = std::min(kBlockElements, end - at);
      if constexpr (kIsNarrow<Codec>) {
        // Computed in float on the master, which is the parameter from then on; the narrow
        // parameter is its rounding.
        T* master = BringSlot<T>(tensor.slots[0], at, count);
        if (tensor.slots[0].from == nullptr) {
          for (size_t i = 0; i < count; ++i) master[i] = Codec::Load(parameter[at + i]);
        }
        T values[kBlockElements];
        for (size_t i = 0; i < count; ++i) values[i] = Codec::Load(gradient[at + i]);
        UpdateValues<T>(algorithm, tensor, h, prepare, master, values, at, count);
        std::memcpy(master, values, count * sizeof(T));
        for (size_t i = 0; i < count; ++i) gradient[at + i] = Codec::Store(values[i]);
      } else {
        UpdateValues<T>(algorithm, tensor, h, prepare, parameter + at, gradient + at, at, count);
      }
    }
  });
}

}  // namespace modelstate
