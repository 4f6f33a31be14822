#include "server/rpc/push_admission.h"

namespace modelstate {

absl::Status CheckPushFits(MemoryBudget& budget, uint64_t total_bytes) {
  const uint64_t used = budget.used();
  if (total_bytes <= budget.limit() && used <= budget.limit() - total_bytes) {
    return absl::OkStatus();
  }
  // For the budget's own words.
  return budget.Reserve(total_bytes).status();
}

}  // namespace modelstate
