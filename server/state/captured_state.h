#ifndef MODELSTATE_SERVER_STATE_CAPTURED_STATE_H_
#define MODELSTATE_SERVER_STATE_CAPTURED_STATE_H_

#include <memory>
#include <optional>
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

// Optimizer state that replaces a module's, ready to be published.
struct StagedOptimizerState {
  // What it was matched with.
  std::shared_ptr<const ModuleSchema> schema;
  std::shared_ptr<const Optimizer> optimizer;
  bool configures = false;       // `optimizer` comes with it; else it is the module's own
  OptimizerState state;          // by schema index, of all parameters
  std::optional<uint64_t> step;  // of the module; unset: as it is
  MemoryBudget::Reservation reservation;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_CAPTURED_STATE_H_
