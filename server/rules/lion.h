#ifndef MODELSTATE_SERVER_RULES_LION_H_
#define MODELSTATE_SERVER_RULES_LION_H_

#include "server/rules/rule.h"

namespace modelstate {

// Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), as lion_pytorch.py of
// google/automl computes it.
struct Lion {
  static constexpr Algorithm kAlgorithm = Algorithm::kLion;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-4, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::beta1, 0.9, Range::kZeroToBelowOne, "beta parameter at index 0"),
      Number(&Hyperparameters::beta2, 0.99, Range::kZeroToBelowOne, "beta parameter at index 1"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {{"exp_avg"}};

  template <typename T>
  struct Scalars {
    T decay;  // 1 - lr * weight_decay
    T beta1, weight1, beta2, weight2, negative_lr;
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t, float) {
    return {1 - *h.lr * *h.weight_decay, *h.beta1, 1 - *h.beta1, *h.beta2, 1 - *h.beta2, -*h.lr};
  }

  static constexpr int kVariants = 1;
  static int Variant(const Hyperparameters&, bool) { return 0; }
  static constexpr bool Uses(int, int slot) { return slot == 0; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    const T update = slots[0] * s.beta1 + g * s.weight1;
    slots[0] = slots[0] * s.beta2 + s.weight2 * g;
    const T sign = static_cast<T>(update > 0) - static_cast<T>(update < 0);
    return p * s.decay + s.negative_lr * sign;
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_LION_H_
