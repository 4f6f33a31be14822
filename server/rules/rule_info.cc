#include "server/rules/rule_info.h"

#include <cstring>

#include "server/rules/rules.h"

namespace modelstate {
namespace {

template <typename Rule>
RuleInfo MakeInfo() {
  RuleInfo info;
  info.hyperparameters = Rule::kHyperparameters;
  info.slots = Rule::kSlots;
  static_assert(std::size(Rule::kSlots) <= kMaxRuleSlots);
  if constexpr (requires { &Rule::Check; }) {
    info.check = &Rule::Check;
  } else {
    info.check = [](const Hyperparameters&) -> const char* { return nullptr; };
  }
  if constexpr (requires { Rule::kProduct; }) {
    info.product = Rule::kProduct;
    info.next_product = &Rule::NextProduct;
  } else {
    info.product = nullptr;
    info.next_product = [](const Hyperparameters&, uint64_t, float product) { return product; };
  }
  info.make_scalars = [](const Hyperparameters& h, uint64_t step, float product) {
    const typename Rule::template Scalars<double> scalars = Rule::MakeScalars(h, step, product);
    RuleScalars values{};
    static_assert(sizeof(scalars) <= sizeof(values));
    std::memcpy(values.data(), &scalars, sizeof(scalars));
    return values;
  };
  return info;
}

}  // namespace

const RuleInfo& GetRule(Algorithm algorithm) {
  static const auto* infos = [] {
    auto* table = new std::array<RuleInfo, 256>();
    for (Algorithm each : AllAlgorithms()) {
      AllRules::Visit(each, [&](auto rule) {
        (*table)[static_cast<uint8_t>(each)] = MakeInfo<decltype(rule)>();
      });
    }
    return table;
  }();
  return (*infos)[static_cast<uint8_t>(algorithm)];
}

bool RuleInfo::has(const HyperparameterField& field) const {
  for (const HyperparameterRule& rule : hyperparameters) {
    if (rule.number == field.number && rule.flag == field.flag) return true;
  }
  return false;
}

Hyperparameters RuleInfo::defaults() const {
  Hyperparameters h;
  for (const HyperparameterRule& rule : hyperparameters) {
    if (rule.number != nullptr) {
      h.*rule.number = rule.default_value;
    } else {
      h.*rule.flag = rule.default_value != 0;
    }
  }
  return h;
}

}  // namespace modelstate
