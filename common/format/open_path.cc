#include "common/format/open_path.h"

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/known_formats.h"
#include "common/format/manifest_text.h"
#include "common/format/safetensors_writer.h"
#include "common/format/sharded_index.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;

constexpr char kTorchModelFile[] = "pytorch_model.bin";

bool Contains(absl::Span<const std::string> names, absl::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

absl::Status LacksManifest() {
  return Corrupt(absl::StrCat("the folder is of a checkpoint that a server saved, and its ",
                              kManifestFile, " is not there: copy it whole, or name ", kModelFile,
                              " in it to take that file alone"));
}

absl::StatusOr<std::vector<std::string>> ListNames(const fs::path& folder) {
  std::error_code error;
  std::vector<std::string> names;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  if (error) return ErrnoError(error.value(), absl::StrCat("list ", ShowName(folder.string())));
  return names;
}

}  // namespace

absl::StatusOr<std::optional<std::string>> FindFolderFile(absl::Span<const std::string> names) {
  MS_RETURN_IF_ERROR(RefuseKnownFolder(names));
  if (Contains(names, kModelFile)) return kModelFile;
  if (std::optional<std::string> index = FindShardedIndex(names)) return index;
  if (Contains(names, kTorchModelFile)) return kTorchModelFile;
  std::vector<std::string> indexes;
  std::copy_if(names.begin(), names.end(), std::back_inserter(indexes),
               [](const std::string& name) { return absl::EndsWith(name, kIndexSuffix); });
  std::sort(indexes.begin(), indexes.end());
  if (indexes.size() > 1) {
    return Unsupported(absl::StrCat("the folder holds several sharded checkpoints, ",
                                    QuotedList(indexes), ": name the index that is meant"));
  }
  if (Contains(names, kOptimizerFile) && !Contains(names, kManifestFile)) return LacksManifest();
  return std::nullopt;
}

absl::Status CheckNeedsNoManifest(const CheckpointReader& reader,
                                  absl::Span<const std::string> names) {
  const bool is_part = reader.metadata().contains(kManifestMetadataKey) ||
                       (Contains(names, kModelFile) && Contains(names, kOptimizerFile));
  if (!is_part) return absl::OkStatus();
  return LacksManifest();
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpointPath(
    const std::string& path, const std::string& state_dict_key, bool allow_opaque) {
  fs::path found = path;
  std::error_code error;
  std::vector<std::string> names;  // of a folder
  if (fs::is_directory(found, error)) {
    MS_ASSIGN_OR_RETURN(names, ListNames(found));
    const absl::StatusOr<std::optional<std::string>> file = FindFolderFile(names);
    if (!file.ok()) return Annotate(file.status(), ShowName(path));
    const std::optional<std::string>& name = *file;
    if (!name) {
      return MakeError(Reason::kCheckpointNotFound,
                       absl::StrCat(ShowName(path), " holds neither ", kModelFile,
                                    ", nor an index of a sharded checkpoint, nor ", kTorchModelFile,
                                    "; name a file in it"));
    }
    found /= *name;
  }
  MS_ASSIGN_OR_RETURN(File file, OpenForRead(found.string()));
  OpenOptions options;
  options.state_dict_key = state_dict_key;
  options.allow_opaque = allow_opaque;
  options.open_sibling = [folder = found.parent_path()](const std::string& name) {
    return OpenForRead((folder / name).string());
  };
  MS_ASSIGN_OR_RETURN(std::unique_ptr<CheckpointReader> reader,
                      OpenCheckpoint(std::move(file), options));
  if (!names.empty() && !Contains(names, kManifestFile)) {
    const absl::Status whole = CheckNeedsNoManifest(*reader, names);
    if (!whole.ok()) return Annotate(whole, ShowName(path));
  }
  return reader;
}

}  // namespace modelstate
