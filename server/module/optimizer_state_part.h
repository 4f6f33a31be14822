#ifndef MODELSTATE_SERVER_MODULE_OPTIMIZER_STATE_PART_H_
#define MODELSTATE_SERVER_MODULE_OPTIMIZER_STATE_PART_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "server/state/module_version.h"
#include "server/state/optimizer.h"
#include "server/state/optimizer_state.h"
#include "server/state/snapshot.h"

namespace modelstate {

// OptimizerStatePlace::slot of ParameterState::product, where the rule has one.
inline constexpr uint32_t kProductPlace = 1 + kMaxSlots;

// A place in a module's optimizer state: slot 0 of a parameter is its step count, slot 1 + i is
// ParameterState::slots[i].
struct OptimizerStatePlace {
  uint32_t parameter = 0;  // schema index
  uint32_t slot = 0;
};

// Which part of it ModuleInstance::ReadOptimizerState is to read.
struct OptimizerStateQuery {
  // The parameters, without aliases, ascending, and the schema that they are of.
  std::shared_ptr<const std::vector<uint32_t>> parameters;
  std::shared_ptr<const ModuleSchema> schema;
  uint64_t epoch = 0;        // ModuleInstance::optimizer_epoch()
  OptimizerStatePlace from;  // where to begin
  size_t max_entries = 0;
  // Hold storages until they have as many bytes together; 0: none. A storage that somebody holds is
  // not written in place by the next step but made anew, so it costs memory and is charged.
  uint64_t max_referenced_bytes = 0;
};

struct OptimizerStatePart {
  struct Entry {
    OptimizerStatePlace place;
    float scalar = 0;    // a step count or product
    StorageRef storage;  // null for a scalar, and where none was asked for
  };
  Version version;
  uint64_t step = 0;  // of the module
  std::shared_ptr<const ModuleSchema> schema;
  std::shared_ptr<const Optimizer> optimizer;
  std::shared_ptr<const HeldVersion> held;  // the storages of `entries`; null where there are none
  std::vector<Entry> entries;               // only of parameters that have stepped
  std::optional<OptimizerStatePlace> next;  // where to go on; nullopt: that was all
  uint64_t count = 0;                       // of all entries there are
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_OPTIMIZER_STATE_PART_H_
