#ifndef MODELSTATE_COMMON_FORMAT_OPEN_PATH_H_
#define MODELSTATE_COMMON_FORMAT_OPEN_PATH_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/format/checkpoint_reader.h"

namespace modelstate {

// OpenCheckpoint for a path of the caller's own choosing, for command-line tools: a file, an index
// with its shards beside it, or a folder that holds one of model.safetensors, an index and
// pytorch_model.bin. Symbolic links are followed, as in the caches of model hubs.
absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpointPath(
    const std::string& path, const std::string& state_dict_key = "", bool allow_opaque = false);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_OPEN_PATH_H_
