#include "common/base/hyperparameters.h"

#include <array>

namespace modelstate {
namespace {

struct NamedAlgorithm {
  Algorithm algorithm;
  const char* name;
};
constexpr NamedAlgorithm kNames[] = {
    {Algorithm::kSgd, "sgd"},           {Algorithm::kAdamW, "adamw"},
    {Algorithm::kAdam, "adam"},         {Algorithm::kAdagrad, "adagrad"},
    {Algorithm::kRmsprop, "rmsprop"},   {Algorithm::kNAdam, "nadam"},
    {Algorithm::kRAdam, "radam"},       {Algorithm::kAdamax, "adamax"},
    {Algorithm::kAdadelta, "adadelta"}, {Algorithm::kLion, "lion"},
};

using H = Hyperparameters;
constexpr HyperparameterField kFields[] = {
    {"lr", &H::lr, nullptr},
    {"weight_decay", &H::weight_decay, nullptr},
    {"maximize", nullptr, &H::maximize},
    {"momentum", &H::momentum, nullptr},
    {"dampening", &H::dampening, nullptr},
    {"nesterov", nullptr, &H::nesterov},
    {"beta1", &H::beta1, nullptr},
    {"beta2", &H::beta2, nullptr},
    {"eps", &H::eps, nullptr},
    {"amsgrad", nullptr, &H::amsgrad},
    {"decoupled_weight_decay", nullptr, &H::decoupled_weight_decay},
    {"lr_decay", &H::lr_decay, nullptr},
    {"initial_accumulator_value", &H::initial_accumulator_value, nullptr},
    {"alpha", &H::alpha, nullptr},
    {"centered", nullptr, &H::centered},
    {"momentum_decay", &H::momentum_decay, nullptr},
    {"rho", &H::rho, nullptr},
};

}  // namespace

std::span<const Algorithm> AllAlgorithms() {
  static constexpr auto kAll = [] {
    std::array<Algorithm, std::size(kNames)> all{};
    for (size_t i = 0; i < all.size(); ++i) all[i] = kNames[i].algorithm;
    return all;
  }();
  return kAll;
}

const char* AlgorithmName(Algorithm algorithm) {
  for (const NamedAlgorithm& named : kNames) {
    if (named.algorithm == algorithm) return named.name;
  }
  return "unknown";
}

std::optional<Algorithm> ParseAlgorithm(std::string_view name) {
  for (const NamedAlgorithm& named : kNames) {
    if (name == named.name) return named.algorithm;
  }
  return std::nullopt;
}

std::span<const HyperparameterField> HyperparameterFields() { return kFields; }

const HyperparameterField* FindHyperparameter(std::string_view name) {
  for (const HyperparameterField& field : kFields) {
    if (name == field.name) return &field;
  }
  return nullptr;
}

Hyperparameters MergeHyperparameters(const Hyperparameters& base,
                                     const Hyperparameters& overrides) {
  Hyperparameters merged = base;
  for (const HyperparameterField& field : kFields) {
    if (!field.is_set(overrides)) continue;
    if (field.number != nullptr) {
      merged.*field.number = overrides.*field.number;
    } else {
      merged.*field.flag = overrides.*field.flag;
    }
  }
  return merged;
}

}  // namespace modelstate
