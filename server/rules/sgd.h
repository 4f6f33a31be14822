#ifndef MODELSTATE_SERVER_RULES_SGD_H_
#define MODELSTATE_SERVER_RULES_SGD_H_

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/sgd.py, _single_tensor_sgd.
struct Sgd {
  static constexpr Algorithm kAlgorithm = Algorithm::kSgd;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-3, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::momentum, 0, Range::kAtLeastZero, "momentum value"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Number(&Hyperparameters::dampening, 0, Range::kFinite, "dampening value"),
      Flag(&Hyperparameters::nesterov),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {
      {"momentum_buffer", [](const Hyperparameters& h) { return *h.momentum != 0; }}};

  static const char* Check(const Hyperparameters& h) {
    return *h.nesterov && (*h.momentum <= 0 || *h.dampening != 0)
               ? "Nesterov momentum requires a momentum and zero dampening"
               : nullptr;
  }

  template <typename T>
  struct Scalars {
    T negative_lr, weight_decay, momentum, one_minus_dampening;
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t, float) {
    return {-*h.lr, *h.weight_decay, *h.momentum, 1 - *h.dampening};
  }

  // Bits: weight decay; nesterov; a momentum buffer; one that is there already.
  static constexpr int kVariants = 16;
  static int Variant(const Hyperparameters& h, bool begins) {
    const bool momentum = *h.momentum != 0;
    return (*h.weight_decay != 0) + 2 * (momentum && *h.nesterov) + 4 * momentum +
           8 * (momentum && !begins);
  }
  static constexpr bool Uses(int variant, int) { return (variant & 4) != 0; }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    if constexpr ((kVariant & 4) != 0) {
      T& buffer = slots[0];
      // The first gradient enters without dampening.
      buffer = (kVariant & 8) != 0 ? buffer * s.momentum + s.one_minus_dampening * g : g;
      g = (kVariant & 2) != 0 ? g + s.momentum * buffer : buffer;
    }
    return p + s.negative_lr * g;
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_SGD_H_
