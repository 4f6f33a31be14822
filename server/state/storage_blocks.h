#ifndef MODELSTATE_SERVER_STATE_STORAGE_BLOCKS_H_
#define MODELSTATE_SERVER_STATE_STORAGE_BLOCKS_H_

#include <cstddef>
#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/digest.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// A part of one storage in a block.
struct BlockPart {
  size_t storage;  // index in the list that is read
  uint64_t begin;
  uint64_t bytes;  // 0 only of a storage that is empty
};

// Takes a block: parts that follow one another, and their bytes, for the time of the call.
using TakeBlock =
    absl::FunctionRef<absl::Status(absl::Span<const BlockPart>, absl::Span<const uint8_t>)>;

// Reads storages of one device one after the other, in blocks of at most 4 MiB of host memory.
// Where the host sees them large parts are blocks by themselves, and read in place; else the next
// block is on its way while one is taken. Many small storages share a block. What `take` returns
// ends it unless OK. RESOURCE_EXHAUSTED DEVICE_MEMORY; INTERNAL, of a device that failed.
absl::Status ReadBlocks(absl::Span<const TensorStorage* const> storages, TakeBlock take);

// Takes the blocks of ReadBlocks, or pieces of them, in order, and caches the XXH3 of each storage
// with its last byte. Thread-compatible.
class StorageDigester {
 public:
  // `bytes` are those of `part`.
  void Take(const TensorStorage& storage, const BlockPart& part, absl::Span<const uint8_t> bytes);

 private:
  Xxh3Stream stream_;
};

// Computes and caches the XXH3 of those storages that have none yet. The same errors; `go_on` is
// asked for each block.
absl::Status DigestStorages(
    absl::Span<const TensorStorage* const> storages,
    absl::FunctionRef<absl::Status()> go_on = [] { return absl::OkStatus(); });

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_STORAGE_BLOCKS_H_
