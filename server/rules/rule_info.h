#ifndef MODELSTATE_SERVER_RULES_RULE_INFO_H_
#define MODELSTATE_SERVER_RULES_RULE_INFO_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "server/rules/rule.h"

namespace modelstate {

inline constexpr size_t kMaxRuleScalars = 12;
// The members of a rule's Scalars<double>, in their order.
using RuleScalars = std::array<double, kMaxRuleScalars>;

// A rule as data, for whatever treats all of them alike. Immutable, static.
struct RuleInfo {
  std::span<const HyperparameterRule> hyperparameters;
  std::span<const SlotRule> slots;
  // Across hyper-parameters: null where they go together, else torch's words.
  const char* (*check)(const Hyperparameters&);
  const char* product;  // the name of the one float per parameter; null: none
  float (*next_product)(const Hyperparameters&, uint64_t step, float product);
  RuleScalars (*make_scalars)(const Hyperparameters&, uint64_t step, float product);

  bool has(const HyperparameterField& field) const;
  Hyperparameters defaults() const;
};

// REQUIRES: not kUnknown. Everywhere `h` is complete: all that the rule has are set.
const RuleInfo& GetRule(Algorithm algorithm);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_RULE_INFO_H_
