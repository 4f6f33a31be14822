#ifndef MODELSTATE_SERVER_RULES_ADAGRAD_H_
#define MODELSTATE_SERVER_RULES_ADAGRAD_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/adagrad.py, _single_tensor_adagrad.
struct Adagrad {
  static constexpr Algorithm kAlgorithm = Algorithm::kAdagrad;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-2, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::lr_decay, 0, Range::kAtLeastZero, "lr_decay value"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Number(&Hyperparameters::initial_accumulator_value, 0, Range::kAtLeastZero,
             "initial_accumulator_value value"),
      Number(&Hyperparameters::eps, 1e-10, Range::kAtLeastZero, "epsilon value"),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {
      {"sum", nullptr, [](const Hyperparameters& h) { return *h.initial_accumulator_value; }}};

  template <typename T>
  struct Scalars {
    T weight_decay, eps;
    T negative_lr;  // decayed
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t step, float) {
    return {*h.weight_decay, *h.eps, -(*h.lr / (1 + static_cast<double>(step - 1) * *h.lr_decay))};
  }

  // Bit: weight decay.
  static constexpr int kVariants = 2;
  static int Variant(const Hyperparameters& h, bool) { return *h.weight_decay != 0; }
  static constexpr bool Uses(int, int slot) { return slot == 0; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    slots[0] = slots[0] + g * g;
    return p + s.negative_lr * g / (std::sqrt(slots[0]) + s.eps);
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_ADAGRAD_H_
