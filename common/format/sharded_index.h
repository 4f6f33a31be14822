#ifndef MODELSTATE_COMMON_FORMAT_SHARDED_INDEX_H_
#define MODELSTATE_COMMON_FORMAT_SHARDED_INDEX_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace modelstate {

inline constexpr uint64_t kMaxShardedIndexBytes = 100'000'000;
// Each is held open. The largest published checkpoints have a few hundred.
inline constexpr size_t kMaxShards = 1000;

// What the JSON text of a sharded checkpoint says, as the Hugging Face libraries write it:
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

// Checks everything that the text alone shows: a name occurs once, shards are plain names of this
// folder. "total_size" is advisory in the format and not looked at. What it allocates is linear in
// the text. Errors as those of CheckpointReader.
absl::StatusOr<ShardedIndex> ParseShardedIndex(absl::string_view json);

// The inverse, with `total_size` in "metadata".
std::string ShardedIndexText(const ShardedIndex& index, uint64_t total_size);

// Of the names in a folder that which is its index: "model.safetensors.index.json", or that of
// PyTorch files, or the only one there is. nullopt: there is none, or it is not clear which.
std::optional<std::string> FindShardedIndex(absl::Span<const std::string> names);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_SHARDED_INDEX_H_
