#ifndef MODELSTATE_SERVER_STATE_MODULE_VERSION_H_
#define MODELSTATE_SERVER_STATE_MODULE_VERSION_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/state/module_schema.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// What made a version. The numbers are those of `modelstate.v1.MutationKind` on the wire.
enum class MutationKind : uint8_t {
  kCreate = 1,
  kLoad = 2,
  kStep = 3,
  kFreeze = 4,
  kMove = 5,
  kDelete = 6,
  kConfigureOptimizer = 7,
  kBufferWrite = 8,  // a load that wrote buffers only
};

using ModuleMetadata = std::map<std::string, std::string>;

// A version but for its tensors.
struct VersionFacts {
  Version version;
  uint64_t step = 0;  // optimizer steps taken
  // Of the last version in which a parameter's elements changed: what staleness is counted by.
  // `parameter_changes` counts such versions.
  uint64_t parameter_changes = 0;
  MutationKind last_mutation = MutationKind::kCreate;
  Device* device = nullptr;  // where all storages are

  std::shared_ptr<const ModuleSchema> schema;
  std::shared_ptr<const ModuleMetadata> metadata;
};

// The whole state of a module at one version. Immutable once published: whoever holds a reference
// reads a consistent state without any lock, for as long as it likes.
struct ModuleVersion : VersionFacts {
  ModuleVersion() = default;
  ModuleVersion(const ModuleVersion&) = default;
  ModuleVersion& operator=(const ModuleVersion&) = delete;
  ~ModuleVersion() { TensorStorage::DropAll(std::move(storages)); }

  // By schema index; an alias refers to its owner's storage.
  std::vector<StorageRef> storages;
  // By schema index: number of the version that last changed the elements.
  std::vector<uint64_t> changed_version;
};

using VersionRef = std::shared_ptr<const ModuleVersion>;

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_MODULE_VERSION_H_
