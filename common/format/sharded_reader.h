#ifndef MODELSTATE_COMMON_FORMAT_SHARDED_READER_H_
#define MODELSTATE_COMMON_FORMAT_SHARDED_READER_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/sharded_index.h"

namespace modelstate {

// A checkpoint in several files and an index that says which tensor lies in which. Every tensor of
// the index must be in its file, and every tensor of a file in the index under that file. Tensors
// are in the order of the index. Read is thread-safe.
class ShardedReader : public CheckpointReader {
 public:
  // Opens the shards by options.open_sibling, and holds them open.
  static absl::StatusOr<std::unique_ptr<ShardedReader>> Open(const File& index,
                                                             const OpenOptions& options);

  CheckpointFormat format() const override { return format_; }
  absl::Span<const std::string> shards() const override { return names_; }
  absl::Status ReadWith(size_t index, absl::Span<uint8_t> out, ReadPass& pass) const override;
  absl::Status ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const override;
  absl::Status Verify(size_t index, ReadPass& pass) const override;
  std::optional<Extent> StoredAt(size_t index) const override;

 private:
  // Where a tensor lies: the shard, and its place there.
  struct Place {
    size_t shard = 0;
    size_t index = 0;
  };

  ShardedReader() = default;
  absl::Status OpenShards(const OpenOptions& options);
  absl::Status TakeTensors(const StoredShardedIndex& index);
  // The error of a tensor that the index does not have in that shard.
  absl::Status NotMapped(const StoredShardedIndex& index, size_t shard,
                         const std::string& name) const;
  absl::Status AddTensors(const std::vector<Place>& tied);
  void AddAliases();
  absl::Status InShard(const Place& place, absl::Status read) const;

  CheckpointFormat format_ = CheckpointFormat::kSafetensorsIndex;
  std::vector<std::string> names_;  // of the shards
  std::vector<std::unique_ptr<CheckpointReader>> shards_;
  std::vector<Place> places_;  // of each tensor
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_SHARDED_READER_H_
