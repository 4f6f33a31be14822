#include "server/checkpoint/checkpoint_store.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/manifest.h"
#include "server/checkpoint/tensor_file.h"

namespace modelstate {
namespace {

constexpr char kDirectoryFormat[] = "modelstate directory";
constexpr int kMaxScanDepth = 16;

bool HasCheckpointSuffix(absl::string_view name) {
  for (const char* suffix : {".safetensors", ".pth", ".pt", ".bin"}) {
    if (absl::EndsWith(name, suffix)) return true;
  }
  return false;
}

// Saves that a crash cut off. Only directories that are named as a save names them.
absl::Status RemoveTemporaries(const RootDirectory& root, const std::string& directory, int depth) {
  if (depth > kMaxScanDepth) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const std::vector<RootDirectory::Entry> entries, root.List(directory));
  for (const RootDirectory::Entry& entry : entries) {
    if (!entry.is_directory) continue;
    const std::string path = JoinPath(directory, entry.name);
    if (IsTemporaryName(entry.name)) {
      MS_RETURN_IF_ERROR(root.RemoveRecursively(path));
    } else if (!root.Stat(absl::StrCat(path, "/", kManifestFile)).ok()) {
      // A directory that may not be read is somebody else's.
      RemoveTemporaries(root, path, depth + 1).IgnoreError();
    }
  }
  return absl::OkStatus();
}

absl::Status VerifyFiles(const RootDirectory& directory, const Manifest& manifest,
                         const std::string& path) {
  for (const Manifest::FileEntry& entry : manifest.files) {
    const std::string name = absl::StrCat(path, "/", entry.name);
    MS_ASSIGN_OR_RETURN(const File file, directory.OpenFile(entry.name));
    MS_ASSIGN_OR_RETURN(const uint64_t digest, DigestFile(file));
    if (digest == entry.xxh3) continue;
    return MakeError(Reason::kDigestMismatch,
                     absl::StrCat(name, " has the XXH3 ", DigestToHex(digest),
                                  ", but the manifest records ", DigestToHex(entry.xxh3),
                                  ": it changed after it was written; use another checkpoint"),
                     {{"file", name}});
  }
  return absl::OkStatus();
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

CheckpointInfo DescribeManifest(const Manifest& manifest, uint64_t manifest_bytes,
                                const std::string& path) {
  CheckpointInfo info;
  info.path = path;
  info.format = kDirectoryFormat;
  info.create_seconds = manifest.create_seconds;
  info.module = manifest.module;
  info.version = manifest.version;
  info.step = manifest.step;
  info.tensor_count = manifest.tensors.size();
  info.has_optimizer = manifest.optimizer.has_value();
  for (const Manifest::FileEntry& file : manifest.files) {
    info.files.push_back({file.name, file.nbytes});
  }
  info.files.push_back({kManifestFile, manifest_bytes});
  for (const CheckpointInfo::FileInfo& file : info.files) info.nbytes += file.nbytes;
  return info;
}

absl::StatusOr<std::unique_ptr<CheckpointStore>> CheckpointStore::Open(
    const std::string& root_path) {
  MS_ASSIGN_OR_RETURN(RootDirectory root, RootDirectory::Open(root_path));
  MS_RETURN_IF_ERROR(RemoveTemporaries(root, ".", 0));
  return std::unique_ptr<CheckpointStore>(new CheckpointStore(std::move(root)));
}

absl::StatusOr<bool> CheckpointStore::IsCheckpointDirectory(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const RootDirectory::Entry entry, root_.Stat(path));
  if (!entry.is_directory) return false;
  const absl::StatusOr<RootDirectory::Entry> manifest =
      root_.Stat(absl::StrCat(path, "/", kManifestFile));
  return manifest.ok() && !manifest->is_directory;
}

std::optional<CheckpointInfo> CheckpointStore::Describe(const std::string& path,
                                                        const RootDirectory::Entry& entry,
                                                        bool verify) const {
  CheckpointInfo info;
  info.path = path;
  info.create_seconds = entry.modified_seconds;
  absl::Status problem;
  if (entry.is_directory) {
    const auto has = [this, &path](const char* name) {
      return root_.Stat(absl::StrCat(path, "/", name)).ok();
    };
    if (IsTemporaryName(entry.name) || (!has(kManifestFile) && !has(kModelFile))) {
      return std::nullopt;
    }
    info.format = kDirectoryFormat;
    problem = WithDirectory(root_, path, [&](const RootDirectory& directory) -> absl::Status {
      MS_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(directory, path));
      MS_ASSIGN_OR_RETURN(const RootDirectory::Entry file, directory.Stat(kManifestFile));
      info = DescribeManifest(manifest, file.size, path);
      return verify ? VerifyFiles(directory, manifest, path) : absl::OkStatus();
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

absl::StatusOr<std::vector<CheckpointInfo>> CheckpointStore::List(const std::string& directory,
                                                                  const std::string& after,
                                                                  size_t limit, bool verify) const {
  const std::string place = directory.empty() ? "." : directory;
  MS_ASSIGN_OR_RETURN(const std::vector<RootDirectory::Entry> entries, root_.List(place));
  std::vector<CheckpointInfo> found;
  for (const RootDirectory::Entry& entry : entries) {
    if (found.size() >= limit) break;
    const std::string path = JoinPath(place, entry.name);
    if (path <= after) continue;
    std::optional<CheckpointInfo> info = Describe(path, entry, verify);
    if (info) found.push_back(*std::move(info));
  }
  return found;
}

absl::Status CheckpointStore::Delete(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const RootDirectory::Entry entry, root_.Stat(path));
  if (path == "." || !Describe(path, entry, /*verify=*/false)) {
    return MakeError(
        Reason::kCheckpointUnsupported,
        absl::StrCat("\"", path, "\" is no checkpoint, so it is left alone: remove it by hand"),
        {{"path", path}});
  }
  {
    absl::MutexLock lock(&mutex_);
    if (saving_.contains(path)) {
      return MakeError(Reason::kCheckpointExists,
                       absl::StrCat("checkpoint \"", path, "\" is being saved: delete it after"),
                       {{"path", path}});
    }
  }
  if (!entry.is_directory) {
    MS_RETURN_IF_ERROR(root_.RemoveRecursively(path));
  } else {
    // Away under another name first: a crash in between leaves a temporary, not half a checkpoint.
    const std::string temporary = TemporaryPath(path, RandomUint64());
    MS_RETURN_IF_ERROR(root_.Rename(path, temporary, /*exchange=*/false));
    MS_RETURN_IF_ERROR(root_.RemoveRecursively(temporary));
  }
  return root_.SyncDirectory(ParentPath(path));
}

}  // namespace modelstate
