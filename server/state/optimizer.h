#ifndef MODELSTATE_SERVER_STATE_OPTIMIZER_H_
#define MODELSTATE_SERVER_STATE_OPTIMIZER_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/optimizer_config.h"
#include "server/state/module_schema.h"

namespace modelstate {

// A configuration resolved against a schema: every parameter is in exactly one group, or in none
// where there is no default group; every group's hyper-parameters are complete (all that the
// algorithm has are set) and in torch's range. Immutable.
class Optimizer {
 public:
  static constexpr uint32_t kNoGroup = std::numeric_limits<uint32_t>::max();

  struct Group {
    std::string name;
    Hyperparameters hyperparameters;
    uint64_t parameter_count = 0;
  };

  // INVALID_ARGUMENT INVALID_FIELD (no known algorithm; a value out of range, with torch's wording;
  // a hyper-parameter that the algorithm does not have; ones that do not go together; more than
  // 1000 groups, two of one name, one named as the default group, a control character in a name, a
  // parameter named in a group that an earlier one has taken, patterns that take more than 10^9
  // comparisons of characters; a quorum above 4096, a round_timeout without min_contributions or
  // the reverse), NOT_A_PARAMETER (a group names a buffer); NOT_FOUND TENSOR_NOT_FOUND.
  static absl::StatusOr<std::shared_ptr<const Optimizer>> Create(const OptimizerConfig& config,
                                                                 const ModuleSchema& schema);

  const OptimizerConfig& config() const { return config_; }
  Algorithm algorithm() const { return config_.algorithm; }
  absl::Span<const Group> groups() const { return groups_; }
  // By schema index: kNoGroup for a buffer, and for a parameter in none.
  uint32_t group_of(uint32_t index) const { return group_of_[index]; }
  size_t schema_size() const { return group_of_.size(); }
  // Parameters in no group, tied ones once.
  uint64_t ungrouped_count() const { return ungrouped_count_; }

  // Hyper-parameters per group with the overrides of one step. INVALID_FIELD as above;
  // OVERRIDE_CONFLICT when two set the same one of the same group, or the group does not exist.
  absl::StatusOr<std::vector<Hyperparameters>> Resolve(
      absl::Span<const GroupOverride> overrides) const;

 private:
  Optimizer() = default;
  OptimizerConfig config_;
  std::vector<Group> groups_;
  std::vector<uint32_t> group_of_;
  uint64_t ungrouped_count_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_OPTIMIZER_H_
