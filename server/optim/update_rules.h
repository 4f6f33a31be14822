#ifndef MODELSTATE_SERVER_OPTIM_UPDATE_RULES_H_
#define MODELSTATE_SERVER_OPTIM_UPDATE_RULES_H_

#include <cmath>

// The elementwise rules of the optimizers, for host and GPU code: free of Abseil and protobuf.
// T is float or double. The order of operations is that of torch.optim with foreach=False,
// fused=False; a compiler must not contract them to fused multiply-adds (-ffp-contract=off,
// --fmad=false), so that every device and instruction set gives the same bits. Scalars are computed
// on the host in double and rounded to T once.

#if defined(__CUDACC__)
#define MODELSTATE_HOST_DEVICE __host__ __device__
#else
#define MODELSTATE_HOST_DEVICE
#endif

namespace modelstate {

// What comes before any rule: unscale, clip, and for maximize negate.
template <typename T>
struct GradientScalars {
  T scale = 1;      // divided by
  T clip_coef = 1;  // multiplied by
  T sign = 1;       // -1: maximize
};

template <typename T>
MODELSTATE_HOST_DEVICE inline T PrepareGradient(const GradientScalars<T>& s, T g) {
  return s.sign * (g / s.scale * s.clip_coef);
}

template <typename T>
struct SgdScalars {
  T negative_lr = 0;
  T weight_decay = 0;
  T momentum = 0;
  T one_minus_dampening = 1;
};

enum class SgdMomentum {
  kNone,
  kFirst,  // no buffer yet: it becomes the gradient, without dampening
  kLater,
};

// Returns the new parameter. `buf` is the momentum buffer, null for kNone.
template <typename T, bool kDecay, SgdMomentum kMomentum, bool kNesterov>
MODELSTATE_HOST_DEVICE inline T SgdUpdate(const SgdScalars<T>& s, T p, T g, T* buf) {
  if constexpr (kDecay) g = g + s.weight_decay * p;
  if constexpr (kMomentum != SgdMomentum::kNone) {
    T b = g;
    if constexpr (kMomentum == SgdMomentum::kLater) {
      b = *buf * s.momentum + s.one_minus_dampening * g;
    }
    *buf = b;
    g = kNesterov ? g + s.momentum * b : b;
  }
  return p + s.negative_lr * g;
}

template <typename T>
struct AdamWScalars {
  T decay = 1;              // 1 - lr * weight_decay
  T weight1 = 0;            // 1 - beta1
  T one_minus_weight1 = 1;  // used where weight1 >= 0.5
  T beta2 = 0;
  T weight2 = 0;     // 1 - beta2
  T sqrt_bias2 = 1;  // sqrt(1 - beta2^t)
  T eps = 0;
  T negative_step_size = 0;  // -lr / (1 - beta1^t)
};

// torch.lerp takes the formula that is exact at the nearer end; kNearStart: weight1 < 0.5.
template <typename T, bool kNearStart>
MODELSTATE_HOST_DEVICE inline T AdamWUpdate(const AdamWScalars<T>& s, T p, T g, T* exp_avg,
                                            T* exp_avg_sq) {
  p = p * s.decay;
  const T m =
      kNearStart ? *exp_avg + s.weight1 * (g - *exp_avg) : g - (g - *exp_avg) * s.one_minus_weight1;
  const T v = *exp_avg_sq * s.beta2 + s.weight2 * g * g;
  *exp_avg = m;
  *exp_avg_sq = v;
  const T denominator = std::sqrt(v) / s.sqrt_bias2 + s.eps;
  return p + s.negative_step_size * m / denominator;
}

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_UPDATE_RULES_H_
