#ifndef MODELSTATE_SERVER_RPC_PUSH_ADMISSION_H_
#define MODELSTATE_SERVER_RPC_PUSH_ADMISSION_H_

#include "absl/status/status.h"
#include "server/device/memory_budget.h"

namespace modelstate {

// Whether a push or load whose header announces `total_bytes` can come in: RESOURCE_EXHAUSTED
// PUSH_MEMORY, with a retry hint where it would fit later. Reserves nothing: the table does.
absl::Status CheckPushFits(MemoryBudget& budget, uint64_t total_bytes);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_PUSH_ADMISSION_H_
