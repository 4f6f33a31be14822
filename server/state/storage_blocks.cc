#include "server/state/storage_blocks.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr uint64_t kBlockBytes = uint64_t{4} << 20;
// What is smaller is gathered where it could be read in place.
constexpr uint64_t kInPlaceBytes = uint64_t{1} << 20;

struct Block {
  std::vector<BlockPart> parts;
  uint64_t bytes = 0;
};

// Cuts a list into blocks, in its order.
class BlockPlan {
 public:
  explicit BlockPlan(absl::Span<const TensorStorage* const> storages)
      : storages_(storages),
        in_place_(!storages.empty() && storages.front()->device().host_visible()) {}

  // Without parts: there are no more.
  Block Next() {
    Block block;
    while (storage_ < storages_.size() && block.bytes < kBlockBytes) {
      const uint64_t size = storages_[storage_]->size();
      uint64_t bytes = std::min(kBlockBytes, size - begin_);
      const bool alone = in_place_ && bytes >= kInPlaceBytes;
      if (alone && block.bytes > 0) break;
      bytes = std::min(bytes, kBlockBytes - block.bytes);
      block.parts.push_back({storage_, begin_, bytes});
      block.bytes += bytes;
      begin_ += bytes;
      if (begin_ == size) {
        ++storage_;
        begin_ = 0;
      }
      if (alone) break;
    }
    return block;
  }

 private:
  const absl::Span<const TensorStorage* const> storages_;
  const bool in_place_;
  size_t storage_ = 0;
  uint64_t begin_ = 0;
};

absl::Status ReadOnHost(absl::Span<const TensorStorage* const> storages, TakeBlock take) {
  BlockPlan plan(storages);
  std::vector<uint8_t> gathered;
  for (Block block = plan.Next(); !block.parts.empty(); block = plan.Next()) {
    const auto bytes_of = [&](const BlockPart& part) {
      return storages[part.storage]->HostBytes().subspan(part.begin, part.bytes);
    };
    if (block.parts.size() == 1) {
      MS_RETURN_IF_ERROR(take(block.parts, bytes_of(block.parts.front())));
      continue;
    }
    gathered.clear();
    for (const BlockPart& part : block.parts) {
      const absl::Span<const uint8_t> bytes = bytes_of(part);
      gathered.insert(gathered.end(), bytes.begin(), bytes.end());
    }
    MS_RETURN_IF_ERROR(take(block.parts, gathered));
  }
  return absl::OkStatus();
}

}  // namespace

void StorageDigester::Take(const TensorStorage& storage, const BlockPart& part,
                           absl::Span<const uint8_t> bytes) {
  if (part.bytes == storage.size()) {
    storage.CacheDigest(Xxh3(bytes));
    return;
  }
  if (part.begin == 0) stream_.Reset();
  stream_.Update(bytes);
  if (part.begin + part.bytes == storage.size()) storage.CacheDigest(stream_.Digest());
}

absl::Status DigestStorages(absl::Span<const TensorStorage* const> storages,
                            absl::FunctionRef<absl::Status()> go_on) {
  std::vector<const TensorStorage*> unknown;
  for (const TensorStorage* storage : storages) {
    if (!storage->CachedDigest()) unknown.push_back(storage);
  }
  StorageDigester digester;
  return ReadBlocks(
      unknown,
      [&](absl::Span<const BlockPart> parts, absl::Span<const uint8_t> bytes) -> absl::Status {
        MS_RETURN_IF_ERROR(go_on());
        for (const BlockPart& part : parts) {
          digester.Take(*unknown[part.storage], part, bytes.subspan(0, part.bytes));
          bytes.remove_prefix(part.bytes);
        }
        return absl::OkStatus();
      });
}

absl::Status ReadBlocks(absl::Span<const TensorStorage* const> storages, TakeBlock take) {
  if (storages.empty()) return absl::OkStatus();
  Device& device = storages.front()->device();
  if (device.host_visible()) return ReadOnHost(storages, take);
  uint64_t total = 0;
  for (const TensorStorage* storage : storages) total += storage->size();
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<HostReader> reader,
                      device.NewReader(std::min(kBlockBytes, total)));
  BlockPlan plan(storages);
  const auto start = [&](const Block& block) {
    std::vector<BufferRange> ranges;
    ranges.reserve(block.parts.size());
    for (const BlockPart& part : block.parts) {
      ranges.push_back({&storages[part.storage]->buffer(), part.begin, part.bytes});
    }
    return reader->Start(ranges);
  };
  Block next = plan.Next();
  MS_ASSIGN_OR_RETURN(std::shared_ptr<HostRead> next_read, start(next));
  while (!next.parts.empty()) {
    const Block block = std::exchange(next, plan.Next());
    const std::shared_ptr<HostRead> read = std::move(next_read);
    if (!next.parts.empty()) {
      MS_ASSIGN_OR_RETURN(next_read, start(next));
    }
    MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, read->Wait());
    MS_RETURN_IF_ERROR(take(block.parts, bytes));
  }
  return absl::OkStatus();
}

}  // namespace modelstate
