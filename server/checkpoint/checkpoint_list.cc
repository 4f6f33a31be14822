// CheckpointStore::List, and what looks for checkpoints with it.
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/checkpoint/manifest.h"

namespace modelstate {
namespace {

bool HasCheckpointSuffix(absl::string_view name) {
  for (const char* suffix : {".safetensors", ".pth", ".pt", ".bin"}) {
    if (absl::EndsWith(name, suffix)) return true;
  }
  return false;
}

// Of a checkpoint, if maybe not of a whole one.
bool HasCheckpointFiles(const RootDirectory& root, const std::string& path) {
  return root.Stat(absl::StrCat(path, "/", kManifestFile)).ok() ||
         root.Stat(absl::StrCat(path, "/", kModelFile)).ok();
}

absl::Status VerifyTensors(const CheckpointReader& reader) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < reader.tensors().size(); ++i) {
    bytes.resize(reader.tensors()[i].nbytes());
    MS_RETURN_IF_ERROR(reader.Read(i, absl::MakeSpan(bytes)));
  }
  return absl::OkStatus();
}

}  // namespace

bool IsNewer(const CheckpointInfo& a, const CheckpointInfo& b) {
  return std::tie(a.create_seconds, a.step, a.path) > std::tie(b.create_seconds, b.step, b.path);
}

CheckpointInfo DescribeManifest(const ManifestHead& head, uint64_t manifest_bytes,
                                const std::string& path) {
  CheckpointInfo info;
  info.path = path;
  info.format = kDirectoryFormat;
  info.create_seconds = head.create_seconds;
  info.module = head.module;
  info.version = head.version;
  info.step = head.step;
  info.weights_only = head.weights_only;
  for (const ManifestFile& file : head.files) info.files.push_back({file.name, file.nbytes});
  info.files.push_back({kManifestFile, manifest_bytes});
  for (const CheckpointInfo::FileInfo& file : info.files) info.nbytes += file.nbytes;
  return info;
}

std::optional<CheckpointInfo> CheckpointStore::Describe(const std::string& path,
                                                        const RootDirectory::Entry& entry,
                                                        bool verify) const {
  CheckpointInfo info;
  info.path = path;
  info.create_seconds = entry.modified_seconds;
  absl::Status problem;
  if (entry.is_directory) {
    if (IsTemporaryName(entry.name) || !HasCheckpointFiles(root_, path)) return std::nullopt;
    info.format = kDirectoryFormat;
    problem = WithDirectory(root_, path, [&](const RootDirectory& directory) -> absl::Status {
      MS_ASSIGN_OR_RETURN(const StoredManifest manifest, ReadManifest(directory, path));
      info = DescribeManifest(manifest.head(), manifest.nbytes(), path);
      info.tensor_count = manifest.tensor_count();
      info.has_optimizer = manifest.has_optimizer();
      if (!verify) return absl::OkStatus();
      const auto open = [&directory](const std::string& name) { return directory.OpenFile(name); };
      return Annotate(VerifyManifestFiles(manifest.head().files, open), path);
    });
  } else {
    if (!HasCheckpointSuffix(entry.name)) return std::nullopt;
    info.nbytes = entry.size;
    info.files.push_back({entry.name, entry.size});
    absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = [&] {
      absl::StatusOr<File> file = root_.OpenFile(path);
      return file.ok() ? OpenCheckpoint(*std::move(file))
                       : absl::StatusOr<std::unique_ptr<CheckpointReader>>(file.status());
    }();
    problem = reader.status();
    if (reader.ok()) {
      info.format = CheckpointFormatName((*reader)->format());
      if (verify) problem = VerifyTensors(**reader);
    }
  }
  if (!problem.ok() && !root_.Stat(path).ok()) return std::nullopt;  // deleted meanwhile
  if (verify) info.verified = problem.ok();
  info.problem = std::string(problem.message());
  return info;
}

absl::Status CheckpointStore::ListBelow(const std::string& directory, const ListOptions& options,
                                        int depth, std::vector<CheckpointInfo>* found) const {
  MS_ASSIGN_OR_RETURN(std::vector<RootDirectory::Entry> entries, root_.List(directory));
  // What is below "a" follows "a-b" in the order of paths, as "a/" does.
  struct Item {
    std::string key;
    const RootDirectory::Entry* entry;
    bool descend = false;
  };
  std::vector<Item> items;
  for (const RootDirectory::Entry& entry : entries) {
    const std::string path = JoinPath(directory, entry.name);
    const bool descend = options.recursive && entry.is_directory && !IsTemporaryName(entry.name) &&
                         !HasCheckpointFiles(root_, path);
    items.push_back({descend ? path + "/" : path, &entry, descend});
  }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.key < b.key; });
  for (const Item& item : items) {
    if (found->size() >= options.limit) break;
    const std::string path = JoinPath(directory, item.entry->name);
    if (item.descend) {
      // All that is below has gone before.
      if (item.key < options.after && !absl::StartsWith(options.after, item.key)) continue;
      if (depth == kMaxScanDepth) continue;
      // A directory that may not be read, or has gone, is left out.
      ListBelow(path, options, depth + 1, found).IgnoreError();
    } else if (path > options.after) {
      std::optional<CheckpointInfo> info = Describe(path, *item.entry, options.verify);
      if (info) found->push_back(*std::move(info));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CheckpointInfo>> CheckpointStore::List(
    const std::string& directory, const ListOptions& options) const {
  std::vector<CheckpointInfo> found;
  MS_RETURN_IF_ERROR(ListBelow(directory.empty() ? "." : directory, options, 0, &found));
  return found;
}

absl::StatusOr<std::vector<CheckpointInfo>> CheckpointStore::Newest(
    const std::string& directory) const {
  ListOptions options;
  options.limit = std::numeric_limits<size_t>::max();
  options.recursive = true;
  MS_ASSIGN_OR_RETURN(std::vector<CheckpointInfo> found, List(directory, options));
  std::erase_if(found, [](const CheckpointInfo& info) {
    return info.format != kDirectoryFormat || !info.problem.empty();
  });
  std::sort(found.begin(), found.end(), IsNewer);
  return found;
}

absl::StatusOr<std::string> CheckpointStore::Resolve(const std::string& path) const {
  MS_RETURN_IF_ERROR(RootDirectory::ValidatePath(path));
  if (LastPart(path) != kLatestName || root_.Stat(path).ok()) return path;
  MS_ASSIGN_OR_RETURN(const std::vector<CheckpointInfo> found, Newest(ParentPath(path)));
  if (!found.empty()) return found.front().path;
  return MakeError(
      Reason::kCheckpointNotFound,
      absl::StrCat("there is no whole checkpoint in \"", ParentPath(path), "\" and below that \"",
                   path, "\" could be; list what is there, with verify"),
      {{"path", path}});
}

}  // namespace modelstate
