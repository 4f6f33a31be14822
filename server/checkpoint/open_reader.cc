#include "server/checkpoint/open_reader.h"

#include <utility>
#include <vector>

#include "common/base/status.h"
#include "common/format/known_formats.h"
#include "common/format/sharded_index.h"

namespace modelstate {

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenReader(const RootDirectory& directory,
                                                             const std::string& path,
                                                             const std::string& name,
                                                             const std::string& state_dict_key) {
  const auto open = [&]() -> absl::StatusOr<std::unique_ptr<CheckpointReader>> {
    MS_ASSIGN_OR_RETURN(File file, directory.OpenFile(name));
    OpenOptions options;
    options.state_dict_key = state_dict_key;
    options.open_sibling = [&directory](const std::string& shard) {
      return directory.OpenFile(shard);
    };
    return OpenCheckpoint(std::move(file), options);
  };
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = open();
  if (!reader.ok() && path != ".") return Annotate(reader.status(), path);
  return reader;
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenListed(const RootDirectory& directory,
                                                             const std::string& path,
                                                             const ManifestFile& entry) {
  const auto open = [&]() -> absl::StatusOr<std::unique_ptr<CheckpointReader>> {
    MS_ASSIGN_OR_RETURN(File file, directory.OpenFile(entry.name));
    MS_RETURN_IF_ERROR(CheckManifestFile(file, entry));
    return OpenCheckpoint(std::move(file));
  };
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = open();
  if (!reader.ok()) return Annotate(reader.status(), path);
  return reader;
}

absl::StatusOr<std::optional<std::string>> FindIndex(const RootDirectory& directory,
                                                     const std::string& path) {
  if (directory.Stat(kManifestFile).ok()) return std::nullopt;
  MS_ASSIGN_OR_RETURN(const std::vector<RootDirectory::Entry> entries, directory.List("."));
  std::vector<std::string> names;
  for (const RootDirectory::Entry& entry : entries) names.push_back(entry.name);
  absl::Status known = RefuseKnownFolder(names);
  if (!known.ok()) return Annotate(known, path);
  return FindShardedIndex(names);
}

}  // namespace modelstate
