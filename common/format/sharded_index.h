#ifndef MODELSTATE_COMMON_FORMAT_SHARDED_INDEX_H_
#define MODELSTATE_COMMON_FORMAT_SHARDED_INDEX_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/format/json_view.h"

namespace modelstate {

inline constexpr uint64_t kMaxShardedIndexBytes = 100'000'000;
// Each is held open. The largest published checkpoints have a few hundred.
inline constexpr size_t kMaxShards = 1000;

// What the JSON text of a sharded checkpoint is to say, as the Hugging Face libraries write it:
// {"metadata": {"total_size": N, ...}, "weight_map": {tensor: file}}. Value type.
struct ShardedIndex {
  struct Entry {
    std::string name;
    size_t shard = 0;  // its place in `shards`
  };
  std::vector<std::string> shards;  // plain file names, by first mention
  std::vector<Entry> entries;       // in the order of the text
  // The members of "metadata" that are text; among them {tied name: owner}.
  std::map<std::string, std::string> metadata;
};

// Whether the first bytes of a file are those of a JSON object, and of no safetensors file.
bool LooksLikeShardedIndex(absl::string_view head);

// The index of a sharded checkpoint as it is stored. Its map stays text, so that it takes the
// memory of its text and less than 16 MiB. Move-only.
class StoredShardedIndex {
 public:
  // Checks all that the text alone shows but whether a tensor is there twice: shards are plain
  // names of this folder. "total_size" is advisory in the format and not looked at. Errors as those
  // of CheckpointReader.
  static absl::StatusOr<StoredShardedIndex> Parse(std::string json);
  static absl::StatusOr<StoredShardedIndex> Read(const File& file);

  // As in ShardedIndex.
  const std::vector<std::string>& shards() const { return shards_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  absl::Status ForEachEntry(absl::FunctionRef<absl::Status(ShardedIndex::Entry entry)> take) const;

 private:
  StoredShardedIndex() = default;
  absl::Status TakeMap();
  absl::Status TakeMetadata(JsonView json);

  std::unique_ptr<const std::string> text_;  // what the view borrows
  JsonView weight_map_;
  std::vector<std::string> shards_;
  absl::flat_hash_map<std::string, size_t> places_;  // of the shards
  std::map<std::string, std::string> metadata_;
};

// The text of an index, with `total_size` in "metadata".
std::string ShardedIndexText(const ShardedIndex& index, uint64_t total_size);

inline constexpr char kIndexSuffix[] = ".index.json";

// Of the names in a folder that which is its index: "model.safetensors.index.json", or that of
// PyTorch files, or the only one there is. nullopt: there is none, or it is not clear which.
std::optional<std::string> FindShardedIndex(absl::Span<const std::string> names);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_SHARDED_INDEX_H_
