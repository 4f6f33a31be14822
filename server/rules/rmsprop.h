#ifndef MODELSTATE_SERVER_RULES_RMSPROP_H_
#define MODELSTATE_SERVER_RULES_RMSPROP_H_

#include <limits>

#include "server/rules/rule.h"

namespace modelstate {

// torch/optim/rmsprop.py, _single_tensor_rmsprop.
struct Rmsprop {
  static constexpr Algorithm kAlgorithm = Algorithm::kRmsprop;
  static constexpr HyperparameterRule kHyperparameters[] = {
      Number(&Hyperparameters::lr, 1e-2, Range::kAtLeastZero, "learning rate"),
      Number(&Hyperparameters::eps, 1e-8, Range::kAtLeastZero, "epsilon value"),
      Number(&Hyperparameters::momentum, 0, Range::kAtLeastZero, "momentum value"),
      Number(&Hyperparameters::weight_decay, 0, Range::kAtLeastZero, "weight_decay value"),
      Number(&Hyperparameters::alpha, 0.99, Range::kAtLeastZero, "alpha value"),
      Flag(&Hyperparameters::centered),
      Flag(&Hyperparameters::maximize),
  };
  static constexpr SlotRule kSlots[] = {
      {"square_avg"},
      {"momentum_buffer", [](const Hyperparameters& h) { return *h.momentum > 0; }},
      {"grad_avg", [](const Hyperparameters& h) { return *h.centered; }}};

  template <typename T>
  struct Scalars {
    T weight_decay, alpha;
    T weight;  // 1 - alpha
    T eps, momentum, negative_lr;
  };
  static Scalars<double> MakeScalars(const Hyperparameters& h, uint64_t, float) {
    return {*h.weight_decay, *h.alpha, 1 - *h.alpha, *h.eps, *h.momentum, -*h.lr};
  }

  // Bits: weight decay; momentum; centered.
  static constexpr int kVariants = 8;
  static int Variant(const Hyperparameters& h, bool) {
    return (*h.weight_decay != 0) + 2 * (*h.momentum > 0) + 4 * *h.centered;
  }
  static constexpr bool Uses(int variant, int slot) {
    return slot == 0 || (variant & (slot == 1 ? 2 : 4)) != 0;
  }

  template <typename T, int kVariant>
  MODELSTATE_HOST_DEVICE static T Update(const Scalars<T>& s, T p, T g, T* slots) {
    if constexpr ((kVariant & 1) != 0) g = g + s.weight_decay * p;
    slots[0] = slots[0] * s.alpha + s.weight * g * g;
    T variance = slots[0];
    if constexpr ((kVariant & 4) != 0) {
      slots[2] = Lerp(slots[2], g, s.weight);
      // Squares beyond the range of T are infinite, which must not be taken from an infinite mean
      // of squares: that is NaN for good. torch's fused multiply-add subtracts the square before it
      // overflows, so that the variance is infinite and the parameter stays. As a minimum, because
      // compilers make vectors of that.
      constexpr T kLargest = std::numeric_limits<T>::max();
      const T square = slots[2] * slots[2];
      variance = variance - (square > kLargest ? kLargest : square);
    }
    const T average = std::sqrt(variance) + s.eps;
    if constexpr ((kVariant & 2) != 0) {
      slots[1] = slots[1] * s.momentum + g / average;
      return p + s.negative_lr * slots[1];
    }
    return p + s.negative_lr * g / average;
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_RMSPROP_H_
