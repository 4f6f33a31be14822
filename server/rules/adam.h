#ifndef MODELSTATE_SERVER_RULES_ADAM_H_
#define MODELSTATE_SERVER_RULES_ADAM_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/adam.py, _single_tensor_adam. AdamW is the same with decoupled weight decay.
struct Adam {
  static constexpr Algorithm kAlgorithm = Algorithm::kAdam;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-3, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::eps, 1e-8, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::beta1, 0.9, Range::kZeroToBelowOne, "beta parameter at index 0"),
      Number(&Hyperparameters::beta2, 0.999, Range::kZeroToBelowOne, "beta parameter at index 1"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Flag(&Hyperparameters::amsgrad),
      Flag(&Hyperparameters::decoupled_weight_decay),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {
      {"exp_avg"}, {"exp_avg_sq"}, {"max_exp_avg_sq", [](const Hyperparameters& h) {
                                      return *h.amsgrad;
                                    }}};

  template <typename T>
  struct Scalars {
    T decay;         // 1 - lr * weight_decay where it is decoupled, else 1
    T weight_decay;  // where it is coupled
    T weight1;       // 1 - beta1
    T beta2, weight2;
    T sqrt_bias2;  // sqrt(1 - beta2^step)
    T eps;
    T negative_step_size;  // -lr / (1 - beta1^step)
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t step, float) {
    const bool decoupled = h.decoupled_weight_decay.value_or(true);  // AdamW has no such choice
    return {decoupled ? 1 - *h.lr * *h.weight_decay : 1,
            decoupled ? 0 : *h.weight_decay,
            1 - *h.beta1,
            *h.beta2,
            1 - *h.beta2,
            std::sqrt(BiasCorrection(*h.beta2, step)),
            *h.eps,
            -(*h.lr / BiasCorrection(*h.beta1, step))};
  }

  // Bits: coupled weight decay; amsgrad.
  static constexpr int kVariants = 4;
  static int Variant(const Hyperparameters& h, bool) {
    const bool coupled = !h.decoupled_weight_decay.value_or(true) && *h.weight_decay != 0;
    return coupled + 2 * *h.amsgrad;
  }
  static constexpr bool Uses(int variant, int slot) { return slot < 2 || (variant & 2) != 0; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    p = p * s.decay;
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    slots[0] = Lerp(slots[0], g, s.weight1);
    slots[1] = slots[1] * s.beta2 + s.weight2 * g * g;
    T v = slots[1];
    if constexpr ((kVariant & 2) != 0) {
      slots[2] = slots[2] > v ? slots[2] : v;
      v = slots[2];
    }
    const T denominator = std::sqrt(v) / s.sqrt_bias2 + s.eps;
    return p + s.negative_step_size * slots[0] / denominator;
  }
};

struct AdamW : Adam {
  static constexpr Algorithm kAlgorithm = Algorithm::kAdamW;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-3, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::eps, 1e-8, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::beta1, 0.9, Range::kZeroToBelowOne, "beta parameter at index 0"),
      Number(&Hyperparameters::beta2, 0.999, Range::kZeroToBelowOne, "beta parameter at index 1"),
      Number(&Hyperparameters::weight_decay, 1e-2, Range::kAtLeastZero, "weight_decay value"),
      Flag(&Hyperparameters::amsgrad),
      Flag(&Hyperparameters::maximize),
  };
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_ADAM_H_
