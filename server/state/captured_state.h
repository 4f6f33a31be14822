#ifndef MODELSTATE_SERVER_STATE_CAPTURED_STATE_H_
#define MODELSTATE_SERVER_STATE_CAPTURED_STATE_H_

#include <memory>
#include <string>

#include "server/device/memory_budget.h"
#include "server/state/module_version.h"
#include "server/state/optimizer.h"
#include "server/state/optimizer_state.h"
#include "server/state/snapshot.h"
#include "server/state/step_record.h"

namespace modelstate {

// Everything a checkpoint keeps, as of one moment between two mutations. Shares the storages: it
// costs no copy, and the module goes on beside it.
struct CapturedState {
  std::string module;
  Snapshot snapshot;
  std::shared_ptr<const Optimizer> optimizer;  // null: none configured
  OptimizerState optimizer_state;
  WorkerRecords workers;
};

// What a directory checkpoint restores beside the state_dict.
struct RestoredState {
  uint64_t step = 0;
  ModuleMetadata metadata;
  std::shared_ptr<const Optimizer>
      optimizer;                   // resolved against the schema after the load; or null
  OptimizerState optimizer_state;  // by index of that schema
  WorkerRecords workers;
  MemoryBudget::Reservation reservation;  // of the bytes of optimizer_state
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_CAPTURED_STATE_H_
