#ifndef MODELSTATE_SERVER_RULES_ADAMAX_H_
#define MODELSTATE_SERVER_RULES_ADAMAX_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/adamax.py, _single_tensor_adamax.
struct Adamax {
  static constexpr Algorithm kAlgorithm = Algorithm::kAdamax;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 2e-3, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::eps, 1e-8, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::beta1, 0.9, Range::kZeroToBelowOne, "beta parameter at index 0"),
      Number(&Hyperparameters::beta2, 0.999, Range::kZeroToBelowOne, "beta parameter at index 1"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {{"exp_avg"}, {"exp_inf"}};

  template <typename T>
  struct Scalars {
    T weight_decay, weight1, beta2, eps;
    T negative_lr;  // corrected: -lr / (1 - beta1^step)
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t step, float) {
    return {*h.weight_decay, 1 - *h.beta1, *h.beta2, *h.eps,
            -(*h.lr / BiasCorrection(*h.beta1, step))};
  }

  // Bit: weight decay.
  static constexpr int kVariants = 2;
  static int Variant(const Hyperparameters& h, bool) { return *h.weight_decay != 0; }
  static constexpr bool Uses(int, int slot) { return slot < 2; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    slots[0] = Lerp(slots[0], g, s.weight1);
    const T before = slots[1] * s.beta2;
    const T now = std::fabs(g) + s.eps;
    slots[1] = before > now ? before : now;
    return p + s.negative_lr * slots[0] / slots[1];
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_ADAMAX_H_
