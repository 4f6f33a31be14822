#ifndef MODELSTATE_COMMON_BASE_HYPERPARAMETERS_H_
#define MODELSTATE_COMMON_BASE_HYPERPARAMETERS_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

// Free of Abseil: the update rules, which GPU code includes, are made from these.
namespace modelstate {

// The numbers are those of `modelstate.v1.Algorithm` on the wire.
enum class Algorithm : uint8_t {
  kUnknown = 0,
  kSgd = 1,
  kAdamW = 2,
  kAdam = 3,
  kAdagrad = 4,
  kRmsprop = 5,
  kNAdam = 6,
  kRAdam = 7,
  kAdamax = 8,
  kAdadelta = 9,
  kLion = 10,
};

// All but kUnknown.
std::span<const Algorithm> AllAlgorithms();
// "sgd", "adamw"; "unknown".
const char* AlgorithmName(Algorithm algorithm);
std::optional<Algorithm> ParseAlgorithm(std::string_view name);

// Names, meaning and defaults are torch.optim's; what is unset comes from elsewhere.
struct Hyperparameters {
  std::optional<double> lr;
  std::optional<double> weight_decay;
  std::optional<bool> maximize;
  std::optional<double> momentum;
  std::optional<double> dampening;
  std::optional<bool> nesterov;
  std::optional<double> beta1;
  std::optional<double> beta2;
  std::optional<double> eps;
  std::optional<bool> amsgrad;
  std::optional<bool> decoupled_weight_decay;
  std::optional<double> lr_decay;
  std::optional<double> initial_accumulator_value;
  std::optional<double> alpha;
  std::optional<bool> centered;
  std::optional<double> momentum_decay;
  std::optional<double> rho;

  bool operator==(const Hyperparameters&) const = default;
};

// One of them, for code that treats them all alike: exactly one of the two members is set.
struct HyperparameterField {
  const char* name;
  std::optional<double> Hyperparameters::*number;
  std::optional<bool> Hyperparameters::*flag;

  bool is_set(const Hyperparameters& h) const {
    return number != nullptr ? (h.*number).has_value() : (h.*flag).has_value();
  }
};

// In the order of their members. The names are those of the members, in messages and files too.
std::span<const HyperparameterField> HyperparameterFields();
const HyperparameterField* FindHyperparameter(std::string_view name);  // null: there is none

// `overrides` where set, else `base`.
Hyperparameters MergeHyperparameters(const Hyperparameters& base, const Hyperparameters& overrides);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_HYPERPARAMETERS_H_
