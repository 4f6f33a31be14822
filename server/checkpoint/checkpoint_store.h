#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_STORE_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_STORE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/base/file.h"
#include "server/checkpoint/checkpoint_job.h"
#include "server/state/captured_state.h"

namespace modelstate {

// What is known of a checkpoint without reading its tensors.
struct CheckpointInfo {
  struct FileInfo {
    std::string name;
    uint64_t nbytes = 0;
  };
  std::string path;    // relative to the root
  std::string format;  // "modelstate directory", or as CheckpointFormatName says
  uint64_t nbytes = 0;
  int64_t create_seconds = 0;  // since the Unix epoch
  // Directory checkpoints only.
  std::string module;
  Version version;
  uint64_t step = 0;
  uint64_t tensor_count = 0;
  bool has_optimizer = false;
  std::vector<FileInfo> files;
  std::optional<bool> verified;
  std::string problem;  // why it cannot be loaded
};

struct SaveOptions {
  bool overwrite = false;
  bool weights_only = false;
};

// The checkpoints below one root directory. A directory checkpoint is `model.safetensors`,
// `optimizer.safetensors` (where there is optimizer state) and `manifest.json`, whose presence and
// digests make it complete; docs/checkpoints.md specifies it. It appears, or replaces another,
// by one rename after everything is on disk: a crash at any moment leaves the old one or the new
// one. Thread-safe; saves to the same path at once: one wins, the other is an error.
class CheckpointStore {
 public:
  // Removes temporaries that a crash left behind.
  static absl::StatusOr<std::unique_ptr<CheckpointStore>> Open(const std::string& root_path);

  const RootDirectory& root() const { return root_; }

  // Makes the parent directories that are missing. ALREADY_EXISTS CHECKPOINT_EXISTS;
  // INVALID_ARGUMENT INVALID_FIELD (path: also one below another checkpoint, one that is taken by a
  // file or a directory that is no checkpoint, and names like those of temporaries),
  // NOT_REPRESENTABLE; RESOURCE_EXHAUSTED STORAGE_FULL; INTERNAL STORAGE_ERROR; CANCELLED.
  absl::StatusOr<CheckpointInfo> Save(const CapturedState& state, const std::string& path,
                                      const SaveOptions& options, const JobControl& control) const;

  // Entries of a directory of the root that are checkpoints, by path, after `after`, at most
  // `limit`. Not recursive. With `verify` every byte is read and compared with the digests.
  absl::StatusOr<std::vector<CheckpointInfo>> List(const std::string& directory,
                                                   const std::string& after, size_t limit,
                                                   bool verify) const;

  // CHECKPOINT_NOT_FOUND; CHECKPOINT_UNSUPPORTED for what is not a checkpoint.
  absl::Status Delete(const std::string& path) const;

 private:
  explicit CheckpointStore(RootDirectory root) : root_(std::move(root)) {}

  // INVALID_FIELD for a path that no checkpoint may have.
  absl::Status CheckNewPath(const std::string& path) const;
  absl::StatusOr<CheckpointInfo> SaveAs(const CapturedState& state, const std::string& path,
                                        const SaveOptions& options,
                                        const JobControl& control) const;
  // One entry of a list; nullopt: not a checkpoint.
  std::optional<CheckpointInfo> Describe(const std::string& path, const RootDirectory::Entry& entry,
                                         bool verify) const;
  absl::StatusOr<bool> IsCheckpointDirectory(const std::string& path) const;

  RootDirectory root_;
  mutable absl::Mutex mutex_;
  mutable std::set<std::string> saving_ ABSL_GUARDED_BY(mutex_);  // paths
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_STORE_H_
