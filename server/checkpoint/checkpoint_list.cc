// CheckpointStore::List, and what looks for checkpoints with it.
#include <algorithm>
#include <limits>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/known_formats.h"
#include "common/format/open_path.h"
#include "common/format/sharded_index.h"
#include "common/format/text.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/checkpoint/manifest.h"
#include "server/checkpoint/open_reader.h"

namespace modelstate {
namespace {

// Of the root of a file system, for its own repair; nobody but root may read it.
constexpr char kLostAndFound[] = "lost+found";

bool HasCheckpointSuffix(absl::string_view name) {
  for (const char* suffix : {".safetensors", ".pth", ".pt", ".bin"}) {
    if (absl::EndsWith(name, suffix)) return true;
  }
  return false;
}

void AddFile(const RootDirectory& directory, const std::string& name, CheckpointInfo* info) {
  const absl::StatusOr<RootDirectory::Entry> file = directory.Stat(name);
  if (!file.ok()) return;
  info->files.push_back({name, file->size});
  info->nbytes += file->size;
}

absl::Status VerifyTensors(const CheckpointReader& reader, CheckpointInfo* info) {
  ReadPass pass;
  for (size_t i = 0; i < reader.tensors().size(); ++i) {
    const StoredTensor& tensor = reader.tensors()[i];
    if (!tensor.alias_of.empty()) continue;
    MS_RETURN_IF_ERROR(reader.Verify(i, pass));
    if (!tensor.is_verifiable()) ++info->unverifiable_tensors;
  }
  return absl::OkStatus();
}

// What is known of a file or a folder that no save made; the error is what is wrong with it.
absl::Status DescribeReader(const RootDirectory& directory, const CheckpointReader& reader,
                            bool verify, CheckpointInfo* info) {
  info->format = CheckpointFormatName(reader.format());
  for (const std::string& shard : reader.shards()) AddFile(directory, shard, info);
  return verify ? VerifyTensors(reader, info) : absl::OkStatus();
}

absl::Status DescribeSaved(const RootDirectory& directory, const std::string& path, bool verify,
                           CheckpointInfo* info) {
  MS_ASSIGN_OR_RETURN(const StoredManifest manifest, ReadManifest(directory, path));
  *info = DescribeManifest(manifest.head(), manifest.nbytes(), path);
  info->tensor_count = manifest.tensor_count();
  info->has_optimizer = manifest.has_optimizer();
  MS_RETURN_IF_ERROR(CheckManifestSizes(directory, path, manifest.head()));
  if (!verify) return absl::OkStatus();
  for (const ManifestFile& entry : manifest.head().files) {
    MS_ASSIGN_OR_RETURN(const auto reader, OpenListed(directory, path, entry));
    MS_RETURN_IF_ERROR(Annotate(VerifyTensors(*reader, info), JoinPath(path, entry.name)));
  }
  return absl::OkStatus();
}

}  // namespace

bool IsNewer(const CheckpointInfo& a, const CheckpointInfo& b) {
  return std::tie(a.create_time, a.step, a.path) > std::tie(b.create_time, b.step, b.path);
}

CheckpointInfo DescribeManifest(const ManifestHead& head, uint64_t manifest_bytes,
                                const std::string& path) {
  CheckpointInfo info;
  info.path = path;
  info.format = kDirectoryFormat;
  info.create_time = head.create_time;
  info.module = head.module;
  info.version = head.version;
  info.step = head.step;
  info.weights_only = head.weights_only;
  for (const ManifestFile& file : head.files) info.files.push_back({file.name, file.nbytes});
  info.files.push_back({kManifestFile, manifest_bytes});
  for (const CheckpointInfo::FileInfo& file : info.files) info.nbytes += file.nbytes;
  return info;
}

std::set<std::string> FindParts(const RootDirectory& root, const std::string& directory,
                                absl::Span<const RootDirectory::Entry> entries) {
  std::vector<std::string> names;
  for (const RootDirectory::Entry& entry : entries) names.push_back(entry.name);
  std::set<std::string> parts;
  const absl::StatusOr<std::optional<std::string>> name = FindFolderFile(names);
  if (name.ok() && name->has_value()) parts.insert(**name);
  const auto moments = std::find(names.begin(), names.end(), kOptimizerFile);
  if (parts.contains(kModelFile) && moments != names.end()) parts.insert(*moments);
  // Also of an index beside the file that is meant by the directory.
  for (const std::string& each : names) {
    if (!absl::EndsWith(each, kIndexSuffix)) continue;
    const absl::StatusOr<File> file = root.OpenFile(JoinPath(directory, each));
    const absl::StatusOr<std::string> head = file.ok() ? ReadHead(*file) : file.status();
    if (!head.ok() || !LooksLikeShardedIndex(*head)) continue;
    const absl::StatusOr<StoredShardedIndex> index = StoredShardedIndex::Read(*file);
    if (!index.ok()) continue;
    parts.insert(each);
    parts.insert(index->shards().begin(), index->shards().end());
  }
  return parts;
}

std::optional<CheckpointInfo> CheckpointStore::Describe(const std::string& path,
                                                        const RootDirectory::Entry& entry,
                                                        bool verify) const {
  CheckpointInfo info;
  info.path = path;
  info.create_time = entry.modified;
  const bool named = IsValidUtf8(entry.name);
  if (entry.leads_out || (!named && (entry.is_directory || HasCheckpointSuffix(entry.name)))) {
    info.closed = true;
    info.problem = named ? "is a symbolic link to outside of the checkpoint root, which is not "
                           "followed: move what it means here, or mount it here"
                         : "has a name that is not UTF-8, which no call can give: rename it";
    if (verify) info.verified = false;
    return info;
  }
  if (entry.is_directory ? IsTemporaryName(entry.name) : !HasCheckpointSuffix(entry.name)) {
    return std::nullopt;
  }
  bool is_checkpoint = !entry.is_directory;
  // Until it is open.
  info.closed = entry.is_directory && entry.name != kLostAndFound;
  const CheckpointInfo blank = info;
  const auto describe_file = [&](const RootDirectory& directory) -> absl::Status {
    info = blank;
    AddFile(directory, entry.name, &info);
    MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader,
                        OpenReader(directory, ParentPath(path), entry.name));
    return DescribeReader(directory, *reader, verify, &info);
  };
  const auto describe_directory = [&](const RootDirectory& directory) -> absl::Status {
    info = blank;
    info.closed = false;
    is_checkpoint = true;
    const absl::StatusOr<RootDirectory::Entry> manifest = directory.Stat(kManifestFile);
    // A disk that does not answer has not said that there is none.
    const bool unknown = GetReason(manifest.status()) == Reason::kStorageError;
    const bool saved = manifest.ok() && !manifest->is_directory;
    if (saved || unknown || HoldsOnlyParts(directory)) info.format = kDirectoryFormat;
    if (unknown) return Annotate(manifest.status(), path);
    if (saved) {
      const absl::Status described = DescribeSaved(directory, path, verify, &info);
      if (!described.ok() && info.files.empty()) {
        for (const char* name : {kModelFile, kOptimizerFile, kManifestFile}) {
          AddFile(directory, name, &info);
        }
      }
      return described;
    }
    MS_ASSIGN_OR_RETURN(const std::optional<FolderCheckpoint> folder, OpenFolder(directory, path));
    is_checkpoint = folder.has_value();
    if (!is_checkpoint) return absl::OkStatus();
    AddFile(directory, folder->name, &info);
    return DescribeReader(directory, *folder->reader, verify, &info);
  };
  const absl::Status problem = entry.is_directory
                                   ? WithDirectory(root_, path, describe_directory)
                                   : WithDirectory(root_, ParentPath(path), describe_file);
  if (!is_checkpoint && !(info.closed && !problem.ok())) return std::nullopt;
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
  // What a directory is itself is one item, of the directory above.
  std::set<std::string> parts;
  if (depth > 0) parts = FindParts(root_, directory, entries);
  for (const RootDirectory::Entry& entry : entries) {
    if (parts.contains(entry.name)) continue;
    const std::string path = JoinPath(directory, entry.name);
    items.push_back({path, &entry, /*descend=*/false});
    const bool descend = options.recursive && entry.is_directory && IsValidUtf8(entry.name) &&
                         !IsTemporaryName(entry.name) && !HasManifest(path).value_or(true);
    if (descend) items.push_back({path + "/", &entry, /*descend=*/true});
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
