#ifndef MODELSTATE_COMMON_BASE_OPTIMIZER_CONFIG_H_
#define MODELSTATE_COMMON_BASE_OPTIMIZER_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "common/base/hyperparameters.h"
#include "common/base/selection.h"

// An optimizer as a caller describes it, the same on both sides of the wire. Value types.
namespace modelstate {

struct ParameterGroup {
  std::string name;
  Selection selection;
  Hyperparameters hyperparameters;
};

// Synchronous training: see `modelstate.v1.Rounds`.
struct Rounds {
  uint32_t quorum = 1;
  uint32_t min_contributions = 0;  // 0: no timeout
  absl::Duration round_timeout = absl::ZeroDuration();
};

struct OptimizerConfig {
  Algorithm algorithm = Algorithm::kUnknown;
  Hyperparameters hyperparameters;
  std::vector<ParameterGroup> groups;
  bool no_default_group = false;  // what no group takes is in none
  std::optional<double> max_grad_norm;
  std::optional<double> max_grad_value;
  std::optional<uint64_t> max_staleness;
  bool master_weights = true;
  Rounds rounds;
};

// Hyper-parameters for one step. `group` unset: every group.
struct GroupOverride {
  std::optional<uint32_t> group;
  Hyperparameters hyperparameters;

  bool operator==(const GroupOverride&) const = default;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_OPTIMIZER_CONFIG_H_
