#include "common/format/convert_checkpoint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/file.h"
#include "common/base/state_layout.h"
#include "common/base/status.h"
#include "common/format/manifest_text.h"
#include "common/format/safetensors_writer.h"
#include "common/format/sharded_index.h"
#include "common/format/text.h"
#include "common/format/torch_state_dict_writer.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;

using Metadata = std::map<std::string, std::string>;

TensorSpec ToSpec(const StoredTensor& stored) {
  TensorSpec spec;
  spec.name = stored.name;
  spec.dtype = stored.dtype;
  spec.shape = stored.shape;
  spec.alias_of = stored.alias_of;
  // What the format's own dtypes of no DType are here: bytes.
  if (stored.opaque_bits != 0) {
    spec.shape = *Shape::Create({static_cast<int64_t>(stored.nbytes())});
  }
  spec.kind = stored.kind.value_or(TensorKind::kParameter);
  spec.requires_grad = stored.requires_grad.value_or(true);
  return spec;
}

class Converter {
 public:
  Converter(const CheckpointReader& reader, const ConvertOptions& options)
      : reader_(reader), options_(options), pass_(options.gate) {
    absl::flat_hash_set<absl::string_view> names;
    for (const StoredTensor& stored : reader.tensors()) {
      specs_.push_back(ToSpec(stored));
      names.insert(stored.name);
      knows_kinds_ &= stored.kind.has_value();
      ++result_.tensors;
      (stored.alias_of.empty() ? result_.bytes : result_.tied_names) +=
          stored.alias_of.empty() ? stored.nbytes() : 1;
    }
    knows_kinds_ &= !specs_.empty();
    metadata_["format"] = "pt";
    for (const auto& [key, value] : reader.metadata()) {
      // Ties, kinds and digests are written anew, and what is written is no part of a directory.
      const bool left_out = names.contains(key) || key == kKindsMetadataKey ||
                            key == kDigestsMetadataKey || key == kManifestMetadataKey;
      if (!left_out) metadata_[key] = value;
    }
  }

  absl::Status WriteFile(const std::string& path) {
    for (const StoredTensor& stored : reader_.tensors()) {
      if (!options_.to_torch || stored.opaque_bits == 0) continue;
      return MakeError(Reason::kNotRepresentable,
                       absl::StrCat("tensor ", ShowName(stored.name), " is ", stored.opaque_dtype,
                                    ", which no .pt file of ours has; write safetensors"));
    }
    MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(path));
    if (options_.to_torch) {
      const auto give = [this](size_t index, ZipWriter::TakeBytes take) {
        return reader_.ReadStream(index, take, pass_);
      };
      MS_RETURN_IF_ERROR(WriteTorchStateDict(file, specs_, reader_.module_versions(), give));
    } else {
      std::vector<size_t> all(specs_.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = i;
      MS_RETURN_IF_ERROR(WriteSafetensors(file, all));
    }
    ++result_.files;
    return file.SyncData();
  }

  absl::Status WriteFolder(const std::string& path) {
    const std::vector<std::vector<size_t>> shards = Split();
    ShardedIndex index;
    for (size_t shard = 0; shard < shards.size(); ++shard) {
      index.shards.push_back(shards.size() == 1 ? "model.safetensors"
                                                : absl::StrFormat("model-%05d-of-%05d.safetensors",
                                                                  shard + 1, shards.size()));
      MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(path + "/" + index.shards.back()));
      MS_RETURN_IF_ERROR(WriteSafetensors(file, shards[shard]));
      MS_RETURN_IF_ERROR(file.SyncData());
      ++result_.files;
      for (size_t i : shards[shard]) {
        if (specs_[i].is_alias()) {
          index.metadata[specs_[i].name] = specs_[i].alias_of;
        } else {
          index.entries.push_back({specs_[i].name, shard});
        }
      }
    }
    if (shards.size() > 1) {
      if (shards.size() > kMaxShards) {
        return MakeError(
            Reason::kInvalidField,
            absl::StrCat("the checkpoint takes ", shards.size(), " shards of this size; at most ",
                         kMaxShards, " are read: choose a larger one"));
      }
      const std::string text = ShardedIndexText(index, result_.bytes);
      MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(path + "/model.safetensors.index.json"));
      MS_RETURN_IF_ERROR(file.WriteAt(0, AsBytes(text)));
      MS_RETURN_IF_ERROR(file.SyncData());
      ++result_.files;
    }
    return SyncFolderOf(path + "/.");
  }

  const ConvertResult& result() const { return result_; }

 private:
  // Of the tensors in turn, tied names with their owners.
  std::vector<std::vector<size_t>> Split() const {
    std::vector<std::vector<size_t>> shards(1);
    absl::flat_hash_map<absl::string_view, size_t> shard_of;
    uint64_t bytes = 0;
    for (size_t i = 0; i < specs_.size(); ++i) {
      if (specs_[i].is_alias()) continue;
      const uint64_t size = specs_[i].nbytes();
      if (!shards.back().empty() && bytes + size > options_.max_shard_bytes) {
        shards.emplace_back();
        bytes = 0;
      }
      bytes += size;
      shards.back().push_back(i);
      shard_of.emplace(specs_[i].name, shards.size() - 1);
    }
    for (size_t i = 0; i < specs_.size(); ++i) {
      if (specs_[i].is_alias()) shards[shard_of.at(specs_[i].alias_of)].push_back(i);
    }
    for (std::vector<size_t>& shard : shards) std::sort(shard.begin(), shard.end());
    return shards;
  }

  // The header has the digests of what follows it, and their text always the same length: it is
  // written last, over its place.
  absl::Status WriteSafetensors(const File& file, const std::vector<size_t>& indices) {
    std::vector<TensorSpec> specs;
    OpaqueEntries opaque;
    for (size_t i : indices) {
      const StoredTensor& stored = reader_.tensors()[i];
      if (stored.opaque_bits != 0) opaque[specs.size()] = {stored.opaque_dtype, stored.shape};
      specs.push_back(specs_[i]);
    }
    const StateLayout layout(specs);
    std::vector<uint64_t> digests(specs.size());
    Metadata metadata = metadata_;
    if (knows_kinds_) metadata[kKindsMetadataKey] = KindsMetadata(specs);
    metadata[kDigestsMetadataKey] = DigestsMetadata(specs, digests);
    MS_ASSIGN_OR_RETURN(std::string header, SafetensorsHeader(specs, layout, metadata, opaque));
    const size_t header_bytes = header.size();
    for (const uint32_t i : layout.by_offset()) {
      uint64_t at = header_bytes + layout.range(i).begin;
      Xxh3Stream hash;
      const auto write = [&](absl::Span<const uint8_t> bytes) {
        hash.Update(bytes);
        return file.WriteAt(std::exchange(at, at + bytes.size()), bytes);
      };
      MS_RETURN_IF_ERROR(reader_.ReadStream(indices[i], write, pass_));
      digests[i] = hash.Digest();
    }
    metadata[kDigestsMetadataKey] = DigestsMetadata(specs, digests);
    MS_ASSIGN_OR_RETURN(header, SafetensorsHeader(specs, layout, metadata, opaque));
    if (header.size() != header_bytes) return absl::InternalError("a header changed its size");
    return file.WriteAt(0, AsBytes(header));
  }

  const CheckpointReader& reader_;
  const ConvertOptions& options_;
  ReadPass pass_;
  std::vector<TensorSpec> specs_;
  bool knows_kinds_ = true;
  Metadata metadata_;
  ConvertResult result_;
};

absl::Status Exists(const std::string& out) {
  return MakeError(Reason::kCheckpointExists,
                   absl::StrCat(ShowName(out), " exists already; give another name, or --force"));
}

bool LiesIn(const fs::path& path, const fs::path& folder) {
  const auto [rest, end] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return rest == folder.end();
}

// Whether with `out` something that is read from `in` would be lost. In its own place what is
// safetensors already has all that is written.
bool IsRead(const std::string& out, const std::string& in, const CheckpointReader& reader) {
  std::error_code error;
  const fs::path to = fs::canonical(out, error);
  const fs::path from = fs::canonical(in, error);
  if (to == from) return IsTorchFormat(reader.format());
  if (LiesIn(from, to)) return true;
  if (fs::is_directory(from, error)) return LiesIn(to, from);
  for (const std::string& shard : reader.shards()) {
    if (to == from.parent_path() / shard) return true;
  }
  return false;
}

// model.safetensors, and the indexes of safetensors in `folder` with the shards that they name.
absl::StatusOr<std::set<std::string>> PartsOf(const fs::path& folder) {
  std::set<std::string> parts = {kModelFile};
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (!absl::EndsWith(name, ".safetensors.index.json")) continue;
    MS_ASSIGN_OR_RETURN(const File file, OpenForRead(it->path().string()));
    const absl::StatusOr<StoredShardedIndex> index = StoredShardedIndex::Read(file);
    if (!index.ok()) continue;
    parts.insert(name);
    parts.insert(index->shards().begin(), index->shards().end());
  }
  return parts;
}

// Whether `out` may be replaced, and is there at all.
absl::StatusOr<bool> CheckTarget(const std::string& out, bool folder, bool force,
                                 const std::string& in, const CheckpointReader& reader) {
  std::error_code error;
  const fs::file_status there = fs::symlink_status(out, error);
  if (!fs::exists(there)) return false;
  if (!force) return Exists(out);
  if (!in.empty() && IsRead(out, in, reader)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(ShowName(out), " is, or has in it, what is read from ",
                                  ShowName(in), ", and would be lost; give another name"));
  }
  const fs::path path(out);
  if (IsSavedFileName(path.filename().string()) &&
      fs::exists(path.parent_path() / kManifestFile, error)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(ShowName(out),
                                  " is a part of a checkpoint that a server saved, "
                                  "which would not load with another; give another "
                                  "name"));
  }
  if (!folder && fs::is_regular_file(there)) return true;
  if (!folder || !fs::is_directory(there)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(ShowName(out), " is no ", folder ? "folder" : "regular file",
                                  ", and is not replaced; give another name"));
  }
  MS_ASSIGN_OR_RETURN(const std::set<std::string> parts, PartsOf(out));
  for (fs::directory_iterator it(out, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (parts.contains(name)) continue;
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(ShowName(out), " holds ", ShowName(name),
                                  ", which is no part of one checkpoint there and would be lost; "
                                  "give another name"));
  }
  if (error) return ErrnoError(error.value(), absl::StrCat("list ", ShowName(out)));
  return true;
}

}  // namespace

absl::StatusOr<ConvertResult> ConvertCheckpoint(const CheckpointReader& reader,
                                                const std::string& given,
                                                const ConvertOptions& options) {
  std::string out = given;
  while (out.size() > 1 && out.back() == '/') out.pop_back();
  const bool folder = options.max_shard_bytes > 0;
  if (folder && options.to_torch) {
    return MakeError(Reason::kInvalidField,
                     "shards are written as safetensors only; leave the size of shards out");
  }
  const fs::path parent = fs::path(out).parent_path();
  std::error_code unknown;
  if (!parent.empty() && !fs::is_directory(parent, unknown)) {
    return MakeError(
        Reason::kCheckpointNotFound,
        absl::StrCat("there is no folder for ", ShowName(out), "; make it, or give another path"),
        {{"path", out}});
  }
  MS_ASSIGN_OR_RETURN(const bool replaces,
                      CheckTarget(out, folder, options.force, options.in, reader));
  const std::string temporary = absl::StrCat(out, ".", getpid(), ".tmp");
  std::error_code ignored;
  fs::remove_all(temporary, ignored);
  const absl::Cleanup remove = [&temporary] {
    std::error_code error;
    fs::remove_all(temporary, error);
  };
  Converter converter(reader, options);
  if (folder) {
    if (mkdir(temporary.c_str(), 0750) != 0) {
      return ErrnoError(errno, absl::StrCat("make ", ShowName(temporary)));
    }
    MS_RETURN_IF_ERROR(converter.WriteFolder(temporary));
  } else {
    MS_RETURN_IF_ERROR(converter.WriteFile(temporary));
  }
  // A folder takes the place of another by an exchange, after which the old one is removed.
  const unsigned int how = !replaces ? RENAME_NOREPLACE : folder ? RENAME_EXCHANGE : 0;
  if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, out.c_str(), how) != 0) {
    if (errno == EEXIST) return Exists(out);
    return ErrnoError(errno, absl::StrCat("rename ", ShowName(temporary)));
  }
  MS_RETURN_IF_ERROR(SyncFolderOf(out));
  return converter.result();
}

}  // namespace modelstate
