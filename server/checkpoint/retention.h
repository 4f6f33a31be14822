#ifndef MODELSTATE_SERVER_CHECKPOINT_RETENTION_H_
#define MODELSTATE_SERVER_CHECKPOINT_RETENTION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "server/checkpoint/checkpoint_info.h"

namespace modelstate {

// Which periodic checkpoints of a module stay: the last `keep_last`, and of each `keep_every` steps
// the first one at or after them. Others than periodic ones are kept for ever. 0: keep_last keeps
// all, keep_every adds none.
struct RetentionPolicy {
  uint64_t keep_last = 0;
  uint64_t keep_every = 0;
};

// `resnet50/step-00001200`: where a periodic save goes.
std::string PeriodicPath(absl::string_view module, uint64_t step);
// The step in the last part of such a path; nullopt for other names.
std::optional<uint64_t> PeriodicStep(absl::string_view path);

// The paths that `policy` does not keep of `checkpoints`, which are periodic ones of one module.
std::vector<std::string> NotKept(std::vector<CheckpointInfo> checkpoints,
                                 const RetentionPolicy& policy);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_RETENTION_H_
