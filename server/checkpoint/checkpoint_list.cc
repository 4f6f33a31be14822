// CheckpointStore::List, and what looks for checkpoints with it.
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/sharded_index.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/checkpoint/manifest.h"
#include "server/checkpoint/open_reader.h"

namespace modelstate {
namespace {

bool HasCheckpointSuffix(absl::string_view name) {
  for (const char* suffix : {".safetensors", ".pth", ".pt", ".bin"}) {
    if (absl::EndsWith(name, suffix)) return true;
  }
  return false;
}

// Of a checkpoint of ours, if maybe not of a whole one.
bool HasCheckpointFiles(const RootDirectory& root, const std::string& path) {
  return root.Stat(JoinPath(path, kManifestFile)).ok() ||
         root.Stat(JoinPath(path, kModelFile)).ok();
}

void AddFile(const RootDirectory& directory, const std::string& name, CheckpointInfo* info) {
  const absl::StatusOr<RootDirectory::Entry> file = directory.Stat(name);
  if (!file.ok()) return;
  info->files.push_back({name, file->size});
  info->nbytes += file->size;
}

absl::Status VerifyTensors(const CheckpointReader& reader) {
  ReadPass pass;
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < reader.tensors().size(); ++i) {
    bytes.resize(reader.tensors()[i].nbytes());
    MS_RETURN_IF_ERROR(reader.ReadWith(i, absl::MakeSpan(bytes), pass));
  }
  return absl::OkStatus();
}

// What is known of a file, or of an index and its shards; the error is what is wrong with it.
absl::Status DescribeReader(const RootDirectory& directory, const std::string& path,
                            const std::string& name, bool verify, CheckpointInfo* info) {
  AddFile(directory, name, info);
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader,
                      OpenReader(directory, path, name));
  info->format = CheckpointFormatName(reader->format());
  for (const std::string& shard : reader->shards()) AddFile(directory, shard, info);
  if (!verify) return absl::OkStatus();
  return VerifyTensors(*reader);
}

absl::Status DescribeSaved(const RootDirectory& directory, const std::string& path, bool verify,
                           CheckpointInfo* info) {
  MS_ASSIGN_OR_RETURN(const StoredManifest manifest, ReadManifest(directory, path));
  *info = DescribeManifest(manifest.head(), manifest.nbytes(), path);
  info->tensor_count = manifest.tensor_count();
  info->has_optimizer = manifest.has_optimizer();
  if (!verify) return absl::OkStatus();
  for (const ManifestFile& entry : manifest.head().files) {
    MS_ASSIGN_OR_RETURN(const auto reader, OpenListed(directory, path, entry));
    MS_RETURN_IF_ERROR(Annotate(VerifyTensors(*reader), JoinPath(path, entry.name)));
  }
  return absl::OkStatus();
}

// The shards of the index that is among the `entries` of `directory`, if there is one that says.
std::vector<std::string> FindShards(const RootDirectory& root, const std::string& directory,
                                    absl::Span<const RootDirectory::Entry> entries) {
  std::vector<std::string> names;
  for (const RootDirectory::Entry& entry : entries) names.push_back(entry.name);
  const std::optional<std::string> name = FindShardedIndex(names);
  if (!name) return {};
  const absl::StatusOr<File> file = root.OpenFile(JoinPath(directory, *name));
  if (!file.ok()) return {};
  const absl::StatusOr<StoredShardedIndex> index = StoredShardedIndex::Read(*file);
  return index.ok() ? index->shards() : std::vector<std::string>();
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
  if (entry.is_directory ? IsTemporaryName(entry.name) : !HasCheckpointSuffix(entry.name)) {
    return std::nullopt;
  }
  const bool ours = entry.is_directory && HasCheckpointFiles(root_, path);
  bool is_checkpoint = ours || !entry.is_directory;
  CheckpointInfo info;
  info.path = path;
  info.create_seconds = entry.modified_seconds;
  if (ours) info.format = kDirectoryFormat;
  const CheckpointInfo blank = info;
  const std::string place = entry.is_directory ? path : ParentPath(path);  // of its files
  const auto describe = [&](const RootDirectory& directory) -> absl::Status {
    info = blank;
    if (!entry.is_directory) return DescribeReader(directory, place, entry.name, verify, &info);
    // Where it is an error the directory is of a format that is not read.
    const absl::StatusOr<std::optional<std::string>> index = FindIndex(directory, path);
    if (!index.ok() || !index->has_value()) {
      return ours ? DescribeSaved(directory, path, verify, &info) : absl::OkStatus();
    }
    is_checkpoint = true;
    info.format.clear();
    return DescribeReader(directory, path, **index, verify, &info);
  };
  const absl::Status problem = WithDirectory(root_, place, describe);
  if (!is_checkpoint) return std::nullopt;
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
  // A sharded checkpoint is one item, of the directory above.
  std::vector<std::string> shards;
  if (depth > 0) shards = FindShards(root_, directory, entries);
  std::sort(shards.begin(), shards.end());
  for (const RootDirectory::Entry& entry : entries) {
    if (std::binary_search(shards.begin(), shards.end(), entry.name)) continue;
    const std::string path = JoinPath(directory, entry.name);
    items.push_back({path, &entry, /*descend=*/false});
    const bool descend = options.recursive && entry.is_directory && !IsTemporaryName(entry.name) &&
                         !HasCheckpointFiles(root_, path);
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
