#include "server/checkpoint/checkpoint_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/manifest.h"

namespace modelstate {
namespace {

bool IsPart(const RootDirectory::Entry& entry) {
  return !entry.is_directory && IsSavedFileName(entry.name);
}

// Removes what saves that a crash cut off have left; not what another server has under way.
void RemoveTemporaries(const RootDirectory& root, const std::string& directory, int depth,
                       const CheckpointStore::Log& log) {
  if (depth > kMaxScanDepth) return;
  const absl::StatusOr<std::vector<RootDirectory::Entry>> entries = root.List(directory);
  // A directory that may not be read is somebody else's.
  if (!entries.ok()) return;
  for (const RootDirectory::Entry& entry : *entries) {
    if (!entry.is_directory) continue;
    const std::string path = JoinPath(directory, entry.name);
    if (!IsTemporaryName(entry.name)) {
      const auto manifest = root.Stat(JoinPath(path, kManifestFile));
      if (!manifest.ok() || manifest->is_directory) {
        RemoveTemporaries(root, path, depth + 1, log);
      }
      continue;
    }
    const absl::StatusOr<RootDirectory> held = root.OpenDirectory(path);
    if (!held.ok()) {
      log(absl::StrCat("\"", path, "\" stays: ", held.status().message()));
      continue;
    }
    if (!held->TryLock() || !held->IsAt(root, path)) {
      log(absl::StrCat("\"", path, "\" stays: another server saves to it"));
      continue;
    }
    if (!HoldsOnlyParts(*held)) {
      log(absl::StrCat("\"", path,
                       "\" has the name of a temporary, but no save made what is in "
                       "it: it stays; give it another name"));
      continue;
    }
    const absl::Status removed = root.RemoveRecursively(path);
    log(removed.ok() ? absl::StrCat("removed \"", path, "\", which a save that was cut off left")
                     : std::string(removed.message()));
  }
}

}  // namespace

bool HoldsOnlyParts(const RootDirectory& directory) {
  const absl::StatusOr<std::vector<RootDirectory::Entry>> entries = directory.List(".");
  return entries.ok() && std::all_of(entries->begin(), entries->end(), IsPart);
}

absl::StatusOr<RootDirectory> HoldDirectory(const RootDirectory& root, const std::string& path) {
  MS_ASSIGN_OR_RETURN(RootDirectory directory, root.OpenDirectory(path));
  if (!directory.TryLock() || !directory.IsAt(root, path)) {
    return MakeError(Reason::kCheckpointExists,
                     absl::StrCat("\"", path,
                                  "\" is in the hands of another server with the same "
                                  "checkpoint root; try again when it is done"),
                     {{"path", path}});
  }
  return directory;
}

absl::Status RemoveParts(const RootDirectory& root, const std::string& directory) {
  MS_RETURN_IF_ERROR(CheckHoldsOnlyParts(root, directory));
  for (const char* name : {kManifestFile, kModelFile, kOptimizerFile}) {
    const absl::Status removed = root.RemoveRecursively(JoinPath(directory, name));
    if (GetReason(removed) != Reason::kCheckpointNotFound) MS_RETURN_IF_ERROR(removed);
  }
  return root.RemoveDirectory(directory);
}

absl::Status CheckHoldsOnlyParts(const RootDirectory& root, const std::string& path) {
  MS_ASSIGN_OR_RETURN(const std::vector<RootDirectory::Entry> entries, root.List(path));
  for (const RootDirectory::Entry& entry : entries) {
    if (IsPart(entry)) continue;
    return MakeError(Reason::kCheckpointUnsupported,
                     absl::StrCat("\"", path, "\" also holds \"", entry.name,
                                  "\", which no save made and which would be lost, so it is left "
                                  "alone: move that away, or remove the directory by hand"),
                     {{"path", path}});
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointStore>> CheckpointStore::Open(const std::string& root_path,
                                                                       const Log& log) {
  MS_ASSIGN_OR_RETURN(RootDirectory root, RootDirectory::Open(root_path));
  RemoveTemporaries(root, ".", 0, log);
  return std::unique_ptr<CheckpointStore>(new CheckpointStore(std::move(root)));
}

absl::StatusOr<bool> CheckpointStore::IsCheckpointDirectory(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const RootDirectory::Entry entry, root_.Stat(path));
  if (!entry.is_directory) return false;
  return HasManifest(path);
}

absl::StatusOr<bool> CheckpointStore::HasManifest(const std::string& path) const {
  const absl::StatusOr<RootDirectory::Entry> manifest = root_.Stat(JoinPath(path, kManifestFile));
  // A disk that does not answer has not said that there is none.
  if (GetReason(manifest.status()) == Reason::kStorageError) return manifest.status();
  return manifest.ok() && !manifest->is_directory;
}

absl::Status CheckpointStore::CheckIsNoPart(const std::string& file) const {
  const std::string directory = ParentPath(file);
  const std::string name(LastPart(file));
  MS_ASSIGN_OR_RETURN(bool is_part, HasManifest(directory));
  if (!is_part) {
    MS_ASSIGN_OR_RETURN(const std::vector<RootDirectory::Entry> entries, root_.List(directory));
    const std::set<std::string> parts = FindParts(root_, directory, entries);
    is_part = parts.size() > 1 && parts.contains(name);
  }
  if (!is_part) return absl::OkStatus();
  return MakeError(
      Reason::kCheckpointUnsupported,
      absl::StrCat("\"", file, "\" is a part of a checkpoint of several files, \"", directory,
                   "\", which would not load without it: name that, or remove it by hand"),
      {{"path", file}});
}

absl::Status CheckpointStore::CheckMayDelete(const std::string& path,
                                             const RootDirectory::Entry& entry) const {
  bool saved = false;
  if (entry.is_directory && path != "." && !IsTemporaryName(LastPart(path))) {
    MS_ASSIGN_OR_RETURN(saved, HasManifest(path));
  }
  if (saved) return CheckHoldsOnlyParts(root_, path);
  const std::optional<CheckpointInfo> info = Describe(path, entry, /*verify=*/false);
  // A directory that others made may hold more than the checkpoint.
  const bool foreign = info && entry.is_directory && info->format != kDirectoryFormat;
  if (path == "." || !info || foreign) {
    return MakeError(Reason::kCheckpointUnsupported,
                     absl::StrCat("\"", path, "\" is ",
                                  foreign ? "a directory that no save made" : "no checkpoint",
                                  ", so it is left alone: remove it by hand"),
                     {{"path", path}});
  }
  return entry.is_directory ? absl::OkStatus() : CheckIsNoPart(path);
}

absl::Status CheckpointStore::Delete(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const RootDirectory::Entry entry, root_.Stat(path));
  MS_RETURN_IF_ERROR(CheckMayDelete(path, entry));
  {
    absl::MutexLock lock(&mutex_);
    if (saving_.contains(path)) {
      return MakeError(Reason::kCheckpointExists,
                       absl::StrCat("checkpoint \"", path, "\" is being saved: delete it after"),
                       {{"path", path}});
    }
  }
  if (!entry.is_directory) {
    MS_RETURN_IF_ERROR(root_.RemoveRecursively(path));
    return root_.SyncDirectory(ParentPath(path));
  }
  MS_ASSIGN_OR_RETURN(const RootDirectory held, HoldDirectory(root_, path));
  // Away under another name first, durably: a crash in between leaves a temporary, not half a
  // checkpoint.
  const std::string temporary = TemporaryPath(path, RandomUint64());
  MS_RETURN_IF_ERROR(root_.Rename(path, temporary, /*exchange=*/false));
  MS_RETURN_IF_ERROR(root_.SyncDirectory(ParentPath(path)));
  const absl::Status removed = RemoveParts(root_, temporary);
  if (removed.ok()) return removed;
  // What somebody put into it meanwhile, or may not be removed. Where all is there still, so is it.
  if (root_.Stat(JoinPath(temporary, kManifestFile)).ok()) {
    MS_RETURN_IF_ERROR(root_.Rename(temporary, path, /*exchange=*/false));
    return Annotate(removed, absl::StrCat("checkpoint \"", path, "\" stays"));
  }
  return Annotate(removed, absl::StrCat("checkpoint \"", path, "\" is deleted, but \"", temporary,
                                        "\" stays: remove it by hand"));
}

absl::Status CheckpointStore::ApplyRetention(const CheckpointInfo& saved,
                                             const RetentionPolicy& policy,
                                             std::vector<std::string>* deleted) const {
  if (policy.keep_last == 0 || !PeriodicStep(saved.path)) return absl::OkStatus();
  const std::string directory = ParentPath(saved.path);
  MS_ASSIGN_OR_RETURN(const std::vector<RootDirectory::Entry> entries, root_.List(directory));
  std::vector<CheckpointInfo> candidates;
  for (const RootDirectory::Entry& entry : entries) {
    if (!entry.is_directory || !PeriodicStep(entry.name)) continue;
    std::optional<CheckpointInfo> info =
        Describe(JoinPath(directory, entry.name), entry, /*verify=*/false);
    // One that is damaged, another module's, or not of that step is not ours to judge.
    if (!info || !info->problem.empty() || info->module != saved.module ||
        info->step != PeriodicStep(entry.name)) {
      continue;
    }
    // Later steps stay until this training has come so far: it may have gone back, or been begun
    // anew, by mistake.
    if (info->step > saved.step) continue;
    candidates.push_back(*std::move(info));
  }
  absl::Status first_error;
  for (const std::string& path : NotKept(std::move(candidates), policy)) {
    if (path == saved.path) continue;
    absl::Status status = Delete(path);
    if (status.ok()) deleted->push_back(path);
    // Two saves may clean up at once.
    if (GetReason(status) != Reason::kCheckpointNotFound) first_error.Update(status);
  }
  return first_error;
}

}  // namespace modelstate
