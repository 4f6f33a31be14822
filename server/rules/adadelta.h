#ifndef MODELSTATE_SERVER_RULES_ADADELTA_H_
#define MODELSTATE_SERVER_RULES_ADADELTA_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/adadelta.py, _single_tensor_adadelta.
struct Adadelta {
  static constexpr Algorithm kAlgorithm = Algorithm::kAdadelta;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::rho, 0.9, Range::kZeroToOne, "rho value"),
      Number(&Hyperparameters::eps, 1e-6, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {{"square_avg"}, {"acc_delta"}};

  template <typename T>
  struct Scalars {
    T weight_decay, rho;
    T weight;  // 1 - rho
    T eps, negative_lr;
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t, float) {
    return {*h.weight_decay, *h.rho, 1 - *h.rho, *h.eps, -*h.lr};
  }

  // Bit: weight decay.
  static constexpr int kVariants = 2;
  static int Variant(const Hyperparameters& h, bool) { return *h.weight_decay != 0; }
  static constexpr bool Uses(int, int slot) { return slot < 2; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    slots[0] = slots[0] * s.rho + s.weight * g * g;
    const T delta = std::sqrt(slots[1] + s.eps) / std::sqrt(slots[0] + s.eps) * g;
    slots[1] = slots[1] * s.rho + s.weight * delta * delta;
    return p + s.negative_lr * delta;
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_ADADELTA_H_
