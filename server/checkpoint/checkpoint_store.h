#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_STORE_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_STORE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/base/file.h"
#include "server/checkpoint/checkpoint_info.h"
#include "server/checkpoint/checkpoint_job.h"
#include "server/checkpoint/retention.h"
#include "server/state/captured_state.h"

namespace modelstate {

struct ListOptions {
  std::string after = "";  // paths after this one
  size_t limit = 100;
  bool verify = false;     // every byte is read and compared with the digests
  bool recursive = false;  // also in directories below that are no checkpoints
};

struct SaveOptions {
  bool overwrite = false;
  // Only over a checkpoint of the same module, else CHECKPOINT_EXISTS; one of another incarnation
  // is not replaced, but gets the name CheckpointInfo::set_aside.
  bool same_module = false;
  bool weights_only = false;
};

// The checkpoints below one root directory. A directory checkpoint is `model.safetensors`,
// `optimizer.safetensors` (where there is optimizer state) and `manifest.json`, whose presence and
// digests make it complete; docs/checkpoints.md specifies it. It appears, or replaces another,
// by one rename after everything is on disk: a crash at any moment leaves the old one or the new
// one. Thread-safe; saves to the same path take turns.
class CheckpointStore {
 public:
  using Log = std::function<void(const std::string&)>;

  // The directory must be there. Removes temporaries that a crash left behind, not those that
  // another process is writing, and tells `log` of each, also of what it could not remove.
  static absl::StatusOr<std::unique_ptr<CheckpointStore>> Open(
      const std::string& root_path, const Log& log = [](const std::string&) {});

  const RootDirectory& root() const { return root_; }

  // Makes the parent directories that are missing. Where a save to that path runs, it waits until
  // that has ended. ALREADY_EXISTS CHECKPOINT_EXISTS; INVALID_ARGUMENT NOT_REPRESENTABLE,
  // INVALID_FIELD (path: also one below another checkpoint, one taken by what is no checkpoint, and
  // names that lists pass over), CHECKPOINT_UNSUPPORTED (what it would replace holds other files);
  // RESOURCE_EXHAUSTED STORAGE_FULL; INTERNAL STORAGE_ERROR; CANCELLED.
  absl::StatusOr<CheckpointInfo> Save(const CapturedState& state, const std::string& path,
                                      const SaveOptions& options, const JobControl& control) const;

  // Entries of a directory of the root that are checkpoints, by path.
  absl::StatusOr<std::vector<CheckpointInfo>> List(const std::string& directory,
                                                   const ListOptions& options) const;

  // The directory checkpoints in a directory and below, the newest first, without those of which
  // it shows, from their manifests and sizes, that they cannot be loaded.
  absl::StatusOr<std::vector<CheckpointInfo>> Newest(const std::string& directory) const;
  // A path whose last part is `latest`, where nothing has that name, is the newest checkpoint in
  // its directory and below; others stay as they are. CHECKPOINT_NOT_FOUND when there is none.
  absl::StatusOr<std::string> Resolve(const std::string& path) const;

  // CHECKPOINT_NOT_FOUND; CHECKPOINT_UNSUPPORTED for what is not a checkpoint, a directory that no
  // save made, and a file that is a part of a checkpoint of several.
  absl::Status Delete(const std::string& path) const;

  // To be called after the commit of `saved`: deletes what `policy` does not keep of the periodic
  // checkpoints of its module in its directory up to its step; nothing when `saved` is none of
  // them. What was deleted; the first error, after having tried the others.
  absl::Status ApplyRetention(const CheckpointInfo& saved, const RetentionPolicy& policy,
                              std::vector<std::string>* deleted) const;

 private:
  explicit CheckpointStore(RootDirectory root) : root_(std::move(root)) {}

  // INVALID_FIELD for a path that no checkpoint may have.
  absl::Status CheckNewPath(const std::string& path) const;
  absl::Status AwaitTurn(const std::string& path, uint64_t ticket, const JobControl& control) const;
  absl::StatusOr<CheckpointInfo> SaveAs(const CapturedState& state, const std::string& path,
                                        const SaveOptions& options,
                                        const JobControl& control) const;
  // One entry of a list; nullopt: not a checkpoint, or gone meanwhile.
  std::optional<CheckpointInfo> Describe(const std::string& path, const RootDirectory::Entry& entry,
                                         bool verify) const;
  absl::StatusOr<bool> IsCheckpointDirectory(const std::string& path) const;
  absl::StatusOr<bool> HasManifest(const std::string& path) const;
  absl::Status CheckMayDelete(const std::string& path, const RootDirectory::Entry& entry) const;
  absl::Status CheckIsNoPart(const std::string& file) const;
  absl::Status ListBelow(const std::string& directory, const ListOptions& options, int depth,
                         std::vector<CheckpointInfo>* found) const;

  RootDirectory root_;
  mutable absl::Mutex mutex_;
  mutable absl::CondVar save_ended_;
  // By path: who saves to it, and those that wait for their turn.
  mutable std::map<std::string, std::vector<uint64_t>> saving_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_STORE_H_
