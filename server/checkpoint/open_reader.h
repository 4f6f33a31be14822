#ifndef MODELSTATE_SERVER_CHECKPOINT_OPEN_READER_H_
#define MODELSTATE_SERVER_CHECKPOINT_OPEN_READER_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/manifest_text.h"

namespace modelstate {

// The file `name` in `directory`, which messages call `path`, and where it is an index its shards
// beside it, which nothing leads out of the directory.
absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenReader(
    const RootDirectory& directory, const std::string& path, const std::string& name,
    const std::string& state_dict_key = "");

// A file of `directory`, which messages call `path`, with the size and the header that its manifest
// records. Also CHECKPOINT_CORRUPT, DIGEST_MISMATCH.
absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenListed(const RootDirectory& directory,
                                                             const std::string& path,
                                                             const ManifestFile& entry);

// What a directory is that no server saved: the name of its model.safetensors, index or
// pytorch_model.bin, and the tensors of that.
struct FolderCheckpoint {
  std::string name;
  std::unique_ptr<CheckpointReader> reader;
};

// Of `directory`, which messages call `path`; nullopt: it has a manifest, or nothing that is known.
// CHECKPOINT_UNSUPPORTED for a format that is known and not read; CHECKPOINT_CORRUPT where its
// manifest is missing.
absl::StatusOr<std::optional<FolderCheckpoint>> OpenFolder(const RootDirectory& directory,
                                                           const std::string& path,
                                                           const std::string& state_dict_key = "");

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_OPEN_READER_H_
