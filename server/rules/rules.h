#ifndef MODELSTATE_SERVER_RULES_RULES_H_
#define MODELSTATE_SERVER_RULES_RULES_H_

#include "server/rules/adadelta.h"
#include "server/rules/adagrad.h"
#include "server/rules/adam.h"
#include "server/rules/adamax.h"
#include "server/rules/lion.h"
#include "server/rules/nadam.h"
#include "server/rules/radam.h"
#include "server/rules/rmsprop.h"
#include "server/rules/sgd.h"

// All rules, for code that is written once for each of them.
namespace modelstate {

template <typename... Rules>
struct RuleList {
  // visit(Rule()) of the one with this algorithm; nothing for kUnknown.
  template <typename Visitor>
  static void Visit(Algorithm algorithm, Visitor visit) {
    (void)((Rules::kAlgorithm == algorithm && (visit(Rules()), true)) || ...);
  }
};

using AllRules = RuleList<Sgd, Adam, AdamW, Adagrad, Rmsprop, NAdam, RAdam, Adamax, Adadelta, Lion>;

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_RULES_H_
