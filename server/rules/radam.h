#ifndef MODELSTATE_SERVER_RULES_RADAM_H_
#define MODELSTATE_SERVER_RULES_RADAM_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/radam.py, _single_tensor_radam.
struct RAdam {
  static constexpr Algorithm kAlgorithm = Algorithm::kRAdam;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-3, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::eps, 1e-8, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::beta1, 0.9, Range::kZeroToBelowOne, "beta parameter at index 0"),
      Number(&Hyperparameters::beta2, 0.999, Range::kZeroToBelowOne, "beta parameter at index 1"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Flag(&Hyperparameters::decoupled_weight_decay),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {{"exp_avg"}, {"exp_avg_sq"}};

  template <typename T>
  struct Scalars {
    T decay, weight_decay;  // as Adam's
    T weight1, beta2, weight2, bias1, sqrt_bias2, eps, lr;
    T rectified;  // 0: the variance is not tractable yet, a step of plain momentum
    T rectification;
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t step, float) {
    const double t = static_cast<double>(step);
    const double bias2 = BiasCorrection(*h.beta2, step);
    const double limit = 2 / (1 - *h.beta2) - 1;
    const double rho = limit - 2 * t * IntegerPower(*h.beta2, step) / bias2;
    const bool rectified = rho > 5;
    const bool decoupled = *h.decoupled_weight_decay;
    return {decoupled ? 1 - *h.lr * *h.weight_decay : 1,
            decoupled ? 0 : *h.weight_decay,
            1 - *h.beta1,
            *h.beta2,
            1 - *h.beta2,
            BiasCorrection(*h.beta1, step),
            std::sqrt(bias2),
            *h.eps,
            *h.lr,
            rectified ? 1.0 : 0.0,
            rectified ? std::sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
                      : 1.0};
  }

  // Bit: coupled weight decay.
  static constexpr int kVariants = 2;
  static int Variant(const Hyperparameters& h, bool) {
    return !*h.decoupled_weight_decay && *h.weight_decay != 0;
  }
  static constexpr bool Uses(int, int slot) { return slot < 2; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    p = p * s.decay;
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    slots[0] = Lerp(slots[0], g, s.weight1);
    slots[1] = slots[1] * s.beta2 + s.weight2 * g * g;
    const T step = slots[0] / s.bias1 * s.lr;
    // torch divides a number by a tensor as the number times the reciprocal.
    const T adaptive = T(1) / (std::sqrt(slots[1]) + s.eps) * s.sqrt_bias2;
    return p - (s.rectified != 0 ? step * adaptive * s.rectification : step);
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_RADAM_H_
