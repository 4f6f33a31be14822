#include "server/rpc/restore.h"

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "common/base/status.h"
#include "server/rpc/checkpoint_load.h"
#include "server/rpc/module_factory.h"

namespace modelstate {
namespace {

absl::StatusOr<VersionRef> LoadInto(const Runtime& runtime, ModuleInstance& module,
                                    const std::string& path) {
  static const auto ignore = [](const JobProgress&) {};
  const JobControl control(ignore);
  MS_ASSIGN_OR_RETURN(const OpenedCheckpoint opened, OpenForLoad(runtime, path, ""));
  LoadOptions options;
  opened.source->Describe(&options);
  MS_ASSIGN_OR_RETURN(PreparedLoad load, PrepareLoad(runtime, module, opened, options,
                                                     /*weights_only=*/false, control));
  absl::StatusOr<VersionRef> committed;
  absl::Notification done;
  module.CommitLoad(std::move(load.staged), std::nullopt, std::move(load.restored),
                    [&](absl::StatusOr<VersionRef> version) {
                      committed = std::move(version);
                      done.Notify();
                    });
  done.WaitForNotification();
  return committed;
}

void RestoreModule(Runtime& runtime, const std::string& name,
                   const std::vector<CheckpointInfo>& newest) {
  const absl::StatusOr<std::shared_ptr<ModuleInstance>> module = CreateEmptyModule(runtime, name);
  if (!module.ok()) {
    runtime.log(absl::LogSeverity::kError,
                absl::StrCat("restore: module \"", name, "\" of \"", newest.front().path,
                             "\" is left out: ", module.status().message()));
    return;
  }
  for (const CheckpointInfo& checkpoint : newest) {
    const absl::StatusOr<VersionRef> loaded = LoadInto(runtime, **module, checkpoint.path);
    if (loaded.ok()) {
      runtime.log(
          absl::LogSeverity::kInfo,
          absl::StrCat("restore: module \"", name, "\" from \"", checkpoint.path, "\", step ",
                       (*loaded)->step, checkpoint.weights_only ? ", weights only" : ""));
      return;
    }
    runtime.log(absl::LogSeverity::kWarning,
                absl::StrCat("restore: \"", checkpoint.path, "\" of module \"", name,
                             "\" is passed over: ", loaded.status().message()));
  }
  absl::Notification deleted;
  runtime.registry->DeleteIfEmpty(*module, [&deleted] { deleted.Notify(); });
  deleted.WaitForNotification();
  runtime.log(absl::LogSeverity::kError,
              absl::StrCat("restore: module \"", name, "\" is left out: none of its ",
                           newest.size(), " checkpoints loads"));
}

}  // namespace

absl::Status RestoreModules(Runtime& runtime) {
  ListOptions options;
  options.limit = std::numeric_limits<size_t>::max();
  options.recursive = true;
  MS_ASSIGN_OR_RETURN(std::vector<CheckpointInfo> found, runtime.checkpoints->List(".", options));
  std::sort(found.begin(), found.end(), [](const CheckpointInfo& a, const CheckpointInfo& b) {
    return a.weights_only != b.weights_only ? b.weights_only : IsNewer(a, b);
  });
  std::map<std::string, std::vector<CheckpointInfo>> of_module;
  for (CheckpointInfo& checkpoint : found) {
    if (!checkpoint.module.empty()) {
      of_module[checkpoint.module].push_back(std::move(checkpoint));
    } else if (checkpoint.format == kDirectoryFormat || checkpoint.closed) {
      runtime.log(
          absl::LogSeverity::kWarning,
          absl::StrCat("restore: \"", checkpoint.path, "\" is passed over: ", checkpoint.problem));
    }
  }
  for (const auto& [name, newest] : of_module) RestoreModule(runtime, name, newest);
  return absl::OkStatus();
}

void WarnOfFormerCheckpoints(Runtime& runtime) {
  const absl::StatusOr<std::vector<CheckpointInfo>> found = runtime.checkpoints->Newest(".");
  if (!found.ok()) return;
  std::set<std::string> modules;
  for (const CheckpointInfo& checkpoint : *found) {
    if (PeriodicStep(checkpoint.path)) modules.insert(checkpoint.module);
  }
  if (modules.empty()) return;
  const std::vector<std::string> names(modules.begin(), modules.end());
  runtime.log(
      absl::LogSeverity::kWarning,
      absl::StrCat("there are periodic checkpoints of ", QuotedList(names),
                   " from before this start: modules that are made anew by these names begin at "
                   "step 0, and --keep_last deletes these as they pass their steps; start with "
                   "--restore=latest to go on with them, or move them away to keep them"));
}

}  // namespace modelstate
