#include "common/format/open_path.h"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/known_formats.h"
#include "common/format/sharded_index.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<fs::path> FindInFolder(const fs::path& folder) {
  std::error_code error;
  std::vector<std::string> names;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  if (error) return ErrnoError(error.value(), absl::StrCat("list ", ShowName(folder.string())));
  MS_RETURN_IF_ERROR(RefuseKnownFolder(names));
  const auto has = [&names](const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (has("model.safetensors")) return folder / "model.safetensors";
  if (const std::optional<std::string> index = FindShardedIndex(names)) return folder / *index;
  if (has("pytorch_model.bin")) return folder / "pytorch_model.bin";
  return MakeError(Reason::kCheckpointNotFound,
                   absl::StrCat(ShowName(folder.string()),
                                " holds neither model.safetensors, nor an index of a sharded "
                                "checkpoint, nor pytorch_model.bin; name a file in it"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpointPath(
    const std::string& path, const std::string& state_dict_key, bool allow_opaque) {
  fs::path found = path;
  std::error_code error;
  if (fs::is_directory(found, error)) {
    MS_ASSIGN_OR_RETURN(found, FindInFolder(found));
  }
  MS_ASSIGN_OR_RETURN(File file, OpenForRead(found.string()));
  OpenOptions options;
  options.state_dict_key = state_dict_key;
  options.allow_opaque = allow_opaque;
  options.open_sibling = [folder = found.parent_path()](const std::string& name) {
    return OpenForRead((folder / name).string());
  };
  return OpenCheckpoint(std::move(file), options);
}

}  // namespace modelstate
