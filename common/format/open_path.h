#ifndef MODELSTATE_COMMON_FORMAT_OPEN_PATH_H_
#define MODELSTATE_COMMON_FORMAT_OPEN_PATH_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/format/checkpoint_reader.h"

namespace modelstate {

// The file by which a folder of these names, without a manifest, is read: model.safetensors, an
// index or pytorch_model.bin. nullopt: it has none. CHECKPOINT_UNSUPPORTED for a folder of a format
// that is known and not read; CHECKPOINT_CORRUPT where an optimizer file is all that is left.
absl::StatusOr<std::optional<std::string>> FindFolderFile(absl::Span<const std::string> names);

// CHECKPOINT_CORRUPT where the folder of these names, which is read by `reader`, is one that a
// server saved and its manifest is not there: a copy that was cut off, say.
absl::Status CheckNeedsNoManifest(const CheckpointReader& reader,
                                  absl::Span<const std::string> names);

// OpenCheckpoint for a path of the caller's own choosing, for command-line tools: a file, an index
// with its shards beside it, or a folder that holds one of model.safetensors, an index and
// pytorch_model.bin. Symbolic links are followed, as in the caches of model hubs.
absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpointPath(
    const std::string& path, const std::string& state_dict_key = "", bool allow_opaque = false);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_OPEN_PATH_H_
