#ifndef MODELSTATE_SERVER_RULES_NADAM_H_
#define MODELSTATE_SERVER_RULES_NADAM_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/nadam.py, _single_tensor_nadam.
struct NAdam {
  static constexpr Algorithm kAlgorithm = Algorithm::kNAdam;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 2e-3, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::eps, 1e-8, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::beta1, 0.9, Range::kZeroToBelowOne, "beta parameter at index 0"),
      Number(&Hyperparameters::beta2, 0.999, Range::kZeroToBelowOne, "beta parameter at index 1"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Number(&Hyperparameters::momentum_decay, 4e-3, Range::kAtLeastZero, "momentum_decay value"),
      Flag(&Hyperparameters::decoupled_weight_decay),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {{"exp_avg"}, {"exp_avg_sq"}};

  static double Momentum(const Hyperparameters& h, double step) {
    return *h.beta1 * (1 - 0.5 * PowerOf096(step * *h.momentum_decay));
  }
  // torch keeps it as a float: so the product is one of floats.
  static constexpr const char* kProduct = "mu_product";
  static float NextProduct(const Hyperparameters& h, uint64_t step, float product) {
    return product * static_cast<float>(Momentum(h, static_cast<double>(step)));
  }

  template <typename T>
  struct Scalars {
    T decay, weight_decay;  // as Adam's
    T weight1, beta2, weight2, bias2, eps;
    T gradient_step;  // -lr (1 - mu_t) / (1 - mu_1 ... mu_t)
    T momentum_step;  // -lr mu_{t+1} / (1 - mu_1 ... mu_{t+1})
  };
  // `product` includes this step's.
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t step, float product) {
    const double t = static_cast<double>(step);
    const double mu = Momentum(h, t);
    const double next_mu = Momentum(h, t + 1);
    const bool decoupled = *h.decoupled_weight_decay;
    return {decoupled ? 1 - *h.lr * *h.weight_decay : 1,
            decoupled ? 0 : *h.weight_decay,
            1 - *h.beta1,
            *h.beta2,
            1 - *h.beta2,
            BiasCorrection(*h.beta2, step),
            *h.eps,
            -*h.lr * (1 - mu) / (1 - static_cast<double>(product)),
            -*h.lr * next_mu / (1 - static_cast<double>(product) * next_mu)};
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
    const T denominator = std::sqrt(slots[1] / s.bias2) + s.eps;
    p = p + s.gradient_step * g / denominator;
    return p + s.momentum_step * slots[0] / denominator;
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_NADAM_H_
