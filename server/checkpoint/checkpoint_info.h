#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_INFO_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_INFO_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/state/module_version.h"

namespace modelstate {

// The format of what CheckpointStore::Save makes, as messages call it.
inline constexpr char kDirectoryFormat[] = "modelstate directory";

// What is known of a checkpoint without reading its tensors.
struct CheckpointInfo {
  struct FileInfo {
    std::string name;
    uint64_t nbytes = 0;
  };
  std::string path;  // relative to the root
  // kDirectoryFormat, or as CheckpointFormatName says; empty where that is not known.
  std::string format;
  uint64_t nbytes = 0;
  absl::Time create_time = absl::UnixEpoch();
  // Directory checkpoints only.
  std::string module;
  Version version;
  uint64_t step = 0;
  uint64_t tensor_count = 0;
  bool has_optimizer = false;
  bool weights_only = false;
  std::vector<FileInfo> files;
  std::optional<bool> verified;
  // Read for that, with no digest or CRC in the file to hold them against.
  uint64_t unverifiable_tensors = 0;
  std::string problem;    // why it cannot be loaded
  std::string set_aside;  // of a save: the path that what was there has now; empty: none was kept
  // A directory that cannot be read or a link to outside: what is below it may be checkpoints.
  bool closed = false;
};

// Whether `a` is the later one of two directory checkpoints: by creation, then step, then path. Not
// by step first: who goes back to step 100 and trains on means what comes of that.
bool IsNewer(const CheckpointInfo& a, const CheckpointInfo& b);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_INFO_H_
