#ifndef MODELSTATE_SERVER_RPC_CHECKPOINT_LOAD_H_
#define MODELSTATE_SERVER_RPC_CHECKPOINT_LOAD_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "server/checkpoint/checkpoint_source.h"
#include "server/rpc/runtime.h"

namespace modelstate {

struct OpenedCheckpoint {
  std::string path;  // what `latest` was
  std::unique_ptr<CheckpointSource> source;
};

// `path` as CheckpointStore::Resolve says, and as CheckpointSource::Open.
absl::StatusOr<OpenedCheckpoint> OpenForLoad(const Runtime& runtime, const std::string& path,
                                             const std::string& state_dict_key);

// What ModuleInstance::CommitLoad takes.
struct PreparedLoad {
  StagedLoad staged;
  std::optional<RestoredState> restored;
};

// Reads all that a load of `opened` into the module needs; the module is as before. The errors of
// LoadPlan::Create, Stage and Restore.
absl::StatusOr<PreparedLoad> PrepareLoad(const Runtime& runtime, const ModuleInstance& module,
                                         const OpenedCheckpoint& opened, const LoadOptions& options,
                                         bool weights_only, const JobControl& control);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_CHECKPOINT_LOAD_H_
