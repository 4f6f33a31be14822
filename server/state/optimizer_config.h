#ifndef MODELSTATE_SERVER_STATE_OPTIMIZER_CONFIG_H_
#define MODELSTATE_SERVER_STATE_OPTIMIZER_CONFIG_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/selection.h"
#include "server/state/module_schema.h"

namespace modelstate {

// The numbers are those of `modelstate.v1.Algorithm` on the wire.
enum class Algorithm : uint8_t { kSgd = 1, kAdamW = 2 };

// "sgd", "adamw".
const char* AlgorithmName(Algorithm algorithm);
std::optional<Algorithm> ParseAlgorithm(absl::string_view name);

// As a caller gives them; names, meaning and defaults are torch.optim's.
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
};

// `overrides` where set, else `base`.
Hyperparameters MergeHyperparameters(const Hyperparameters& base, const Hyperparameters& overrides);

struct ParameterGroupConfig {
  std::string name;
  Selection selection;
  Hyperparameters hyperparameters;
};

struct OptimizerConfig {
  Algorithm algorithm = Algorithm::kSgd;
  Hyperparameters hyperparameters;
  std::vector<ParameterGroupConfig> groups;
  std::optional<double> max_grad_norm;
  uint32_t quorum = 1;
  std::optional<uint64_t> max_staleness;
};

// Hyper-parameters for one step. `group` unset: every group.
struct GroupOverride {
  std::optional<uint32_t> group;
  Hyperparameters hyperparameters;
};

// A configuration resolved against a schema: every parameter is in exactly one group, every group's
// hyper-parameters are complete (all that the algorithm has are set) and in torch's range.
// Immutable.
class Optimizer {
 public:
  struct Group {
    std::string name;
    Hyperparameters hyperparameters;
    uint64_t parameter_count = 0;
  };

  // INVALID_ARGUMENT INVALID_FIELD (a value out of range, with torch's wording; a hyper-parameter
  // that the algorithm does not have; nesterov without momentum or with dampening; more than 1000
  // groups, two of one name, a name in a group that an earlier one has taken), NOT_A_PARAMETER
  // (a group names a buffer); NOT_FOUND TENSOR_NOT_FOUND.
  static absl::StatusOr<std::shared_ptr<const Optimizer>> Create(const OptimizerConfig& config,
                                                                 const ModuleSchema& schema);

  const OptimizerConfig& config() const { return config_; }
  Algorithm algorithm() const { return config_.algorithm; }
  absl::Span<const Group> groups() const { return groups_; }
  // By schema index; parameters only.
  uint32_t group_of(uint32_t index) const { return group_of_[index]; }

  // Hyper-parameters per group with the overrides of one step. INVALID_FIELD as above;
  // OVERRIDE_CONFLICT when two set the same one of the same group, or the group does not exist.
  absl::StatusOr<std::vector<Hyperparameters>> Resolve(
      absl::Span<const GroupOverride> overrides) const;

 private:
  Optimizer() = default;
  OptimizerConfig config_;
  std::vector<Group> groups_;
  std::vector<uint32_t> group_of_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_OPTIMIZER_CONFIG_H_
