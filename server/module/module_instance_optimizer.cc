// What of ModuleInstance sets and shows the optimizer.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"

namespace modelstate {
namespace {

// Whether a step finds the same optimizer state under both: then it may be kept.
bool SameSlots(const Optimizer& before, const Optimizer& after, uint32_t index, DType dtype) {
  if (before.algorithm() != after.algorithm()) return false;
  const auto slots = [index, dtype](const Optimizer& optimizer) {
    return OptimizerSlots(optimizer.algorithm(),
                          optimizer.groups()[optimizer.group_of(index)].hyperparameters, dtype);
  };
  const std::vector<SlotInfo> a = slots(before);
  const std::vector<SlotInfo> b = slots(after);
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const SlotInfo& x, const SlotInfo& y) {
                      return absl::string_view(x.name) == y.name && x.dtype == y.dtype;
                    });
}

}  // namespace

absl::StatusOr<VersionRef> ModuleInstance::ConfigureOnStrand(const OptimizerConfig& config,
                                                             bool reset_state) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  const VersionRef current = Current();
  const ModuleSchema& schema = *current->schema;
  if (schema.empty()) return EmptyError();
  if (config.quorum > 1) {
    return MakeError(
        Reason::kNotImplemented,
        absl::StrCat(
            "rounds.quorum is ", config.quorum,
            ": rounds of more than one contribution are not built yet; leave it out, or set 1"));
  }
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const Optimizer> next_optimizer,
                      Optimizer::Create(config, schema));
  const std::shared_ptr<const Optimizer> before = optimizer();
  for (uint32_t index = 0; index < schema.size(); ++index) {
    ParameterState& state = optimizer_state_.parameters[index];
    if (schema.spec(index).kind != TensorKind::kParameter || state.step == 0) continue;
    if (reset_state || before == nullptr ||
        !SameSlots(*before, *next_optimizer, index, schema.spec(index).dtype)) {
      state = ParameterState();
    }
  }
  Publish(NextVersion(MutationKind::kConfigureOptimizer), std::move(next_optimizer));
  return Current();
}

}  // namespace modelstate
