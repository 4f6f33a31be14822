#ifndef MODELSTATE_SERVER_RULES_RULE_H_
#define MODELSTATE_SERVER_RULES_RULE_H_

#include <cmath>
#include <cstdint>

#include "common/base/hyperparameters.h"
#include "server/rules/power.h"

#if defined(__CUDACC__)
#define MODELSTATE_HOST_DEVICE __host__ __device__
#else
#define MODELSTATE_HOST_DEVICE
#endif

// What the files of this folder have in common. Each holds one optimizer's rule, whole: its
// hyper-parameters with their defaults and ranges, the state that it keeps, and the update of one
// element, for host and GPU code alike. A new rule is a file here, a line in rules.h, and its
// number in `modelstate.v1.Algorithm` and Algorithm.
//
// The oracle is torch.optim with foreach=False, fused=False: the same operations in the same order.
// T is float or double. A compiler must not contract a multiply and an add (-ffp-contract=off,
// --fmad=false). What depends on the step but not on the element is computed on the host in double
// and rounded to T once. So every device and instruction set gives the same bits.
//
// A rule is a struct with
//
//   kAlgorithm
//   kHyperparameters   HyperparameterRule[], in the order of torch's checks
//   kSlots             SlotRule[], at most kMaxRuleSlots: what is kept per element
//   Scalars<T>         an aggregate of T alone
//   MakeScalars(h, step, product) -> Scalars<double>; `step` counts from 1
//   kVariants, Variant(h, begins), Uses(variant, slot)
//                      what an update is compiled for: a variant is fixed for a whole tensor, and
//                      names the slots that it reads and writes. `begins`: this is the first step
//                      of slot 0.
//   Update<T, variant>(scalars, parameter, gradient, T* slots) -> the new parameter
//
// and, where there is something to say, Check(h) across hyper-parameters (null: fine; else torch's
// words), and kProduct with NextProduct(h, step, product): the name of one float per parameter.
//
// Rules are elementwise. One that needs sums over its tensor (LAMB, Adafactor) gets them as further
// scalars of the tensor, from a pass before the update that adds over the same fixed blocks as the
// gradient norm does.
namespace modelstate {

inline constexpr int kMaxRuleSlots = 3;

enum class Range : uint8_t {
  kAtLeastZero,
  kZeroToOne,       // [0, 1]
  kZeroToBelowOne,  // [0, 1)
  kFinite,
};

struct HyperparameterRule {
  std::optional<double> Hyperparameters::*number;
  std::optional<bool> Hyperparameters::*flag;
  double default_value;
  Range range;       // of a number
  const char* what;  // as torch names it: "Invalid WHAT: -1.0"
};

constexpr HyperparameterRule Number(std::optional<double> Hyperparameters::*field,
                                    double default_value, Range range, const char* what) {
  return {field, nullptr, default_value, range, what};
}
constexpr HyperparameterRule Flag(std::optional<bool> Hyperparameters::*field) {
  return {nullptr, field, 0, Range::kFinite, ""};
}

struct SlotRule {
  const char* name;  // the key in torch's state
  // Whether a step with these hyper-parameters keeps it; null: always.
  bool (*kept)(const Hyperparameters&) = nullptr;
  // Before the first step; null: 0.
  double (*initial)(const Hyperparameters&) = nullptr;
};

// What comes before any rule: clip, and for maximize negate.
template <typename T>
struct GradientScalars {
  T clip_coef = 1;
  T clip_value = 0;  // elements are brought into [-clip_value, clip_value]; 0: they are not
  T sign = 1;        // -1: maximize
};

template <typename T>
MODELSTATE_HOST_DEVICE inline T PrepareGradient(const GradientScalars<T>& s, T g) {
  g = g * s.clip_coef;
  if (s.clip_value > 0) {
    g = g < -s.clip_value ? -s.clip_value : g;
    g = g > s.clip_value ? s.clip_value : g;
  }
  return s.sign * g;
}

// torch.lerp: of two formulas the one that is exact at the nearer end.
template <typename T>
MODELSTATE_HOST_DEVICE inline T Lerp(T start, T end, T weight) {
  const bool near_start = weight < T(0.5);
  return (near_start ? start : end) + (near_start ? weight : weight - T(1)) * (end - start);
}

// 1 - beta^step.
inline double BiasCorrection(double beta, uint64_t step) { return 1 - IntegerPower(beta, step); }

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_RULE_H_
