#include "server/rpc/checkpoint_load.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {

absl::StatusOr<OpenedCheckpoint> OpenForLoad(const Runtime& runtime, const std::string& path,
                                             const std::string& state_dict_key) {
  // What was the newest may be deleted before it is open: then there is a newer one.
  constexpr int kMaxAttempts = 10;
  for (int attempt = 1;; ++attempt) {
    OpenedCheckpoint opened;
    MS_ASSIGN_OR_RETURN(opened.path, runtime.checkpoints->Resolve(path));
    absl::StatusOr<std::unique_ptr<CheckpointSource>> source =
        CheckpointSource::Open(runtime.checkpoints->root(), opened.path, state_dict_key);
    if (source.ok()) {
      opened.source = *std::move(source);
      return opened;
    }
    if (attempt == kMaxAttempts || opened.path == path ||
        GetReason(source.status()) != Reason::kCheckpointNotFound) {
      return source.status();
    }
  }
}

absl::StatusOr<PreparedLoad> PrepareLoad(const Runtime& runtime, const ModuleInstance& module,
                                         const OpenedCheckpoint& opened, const LoadOptions& options,
                                         bool weights_only, const JobControl& control) {
  const CheckpointSource& source = *opened.source;
  const VersionRef current = module.Current();
  MemoryBudget& budget = *module.environment().push_budget;
  PreparedLoad load;
  MS_ASSIGN_OR_RETURN(LoadPlan plan,
                      LoadPlan::Create(module.name(), current->schema, source.incoming(), options));
  MS_ASSIGN_OR_RETURN(load.staged, source.Stage(std::move(plan), *current->device, budget,
                                                *runtime.readers, control));
  if (!weights_only) {
    MS_ASSIGN_OR_RETURN(load.restored, source.Restore(*load.staged.plan.schema, *current->device,
                                                      budget, control, runtime.readers.get()));
  }
  load.staged.detail = absl::StrCat(opened.path, " (", source.format(), ")",
                                    load.restored ? ", with its step and optimizer" : "");
  return load;
}

}  // namespace modelstate
