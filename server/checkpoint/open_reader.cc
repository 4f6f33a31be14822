#include "server/checkpoint/open_reader.h"

#include <utility>
#include <vector>

#include "common/base/status.h"
#include "common/format/open_path.h"

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

absl::StatusOr<std::optional<FolderCheckpoint>> OpenFolder(const RootDirectory& directory,
                                                           const std::string& path,
                                                           const std::string& state_dict_key) {
  const absl::StatusOr<std::vector<RootDirectory::Entry>> entries = directory.List(".");
  if (!entries.ok()) return Annotate(entries.status(), path);
  std::vector<std::string> names;
  for (const RootDirectory::Entry& entry : *entries) {
    if (entry.name == kManifestFile && !entry.is_directory) return std::nullopt;
    names.push_back(entry.name);
  }
  const absl::StatusOr<std::optional<std::string>> name = FindFolderFile(names);
  if (!name.ok()) return Annotate(name.status(), path);
  if (!name->has_value()) return std::nullopt;
  FolderCheckpoint folder{**name, nullptr};
  MS_ASSIGN_OR_RETURN(folder.reader, OpenReader(directory, path, folder.name, state_dict_key));
  const absl::Status whole = CheckNeedsNoManifest(*folder.reader, names);
  if (!whole.ok()) return Annotate(whole, path);
  return folder;
}

}  // namespace modelstate
