#ifndef MODELSTATE_COMMON_FORMAT_CONVERT_CHECKPOINT_H_
#define MODELSTATE_COMMON_FORMAT_CONVERT_CHECKPOINT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "common/format/checkpoint_reader.h"

namespace modelstate {

struct ConvertOptions {
  // A file for torch.load instead of safetensors. It has no place for kinds, digests and metadata.
  bool to_torch = false;
  // Not 0, for safetensors: `out` becomes a folder of shards with at most so many bytes of elements
  // (a larger tensor has one of its own) and their index, or of model.safetensors alone where one
  // is enough.
  uint64_t max_shard_bytes = 0;
  // Replace what is at `out`; a folder only where it is one checkpoint of safetensors and holds
  // nothing else. Neither what is read nor a part of a checkpoint that a server saved.
  bool force = false;
  // Where what `reader` reads lies: a file or a folder.
  std::string in;
  // Asked before each piece that is read (ReadPass::Gate); what it returns ends the
  // conversion unless OK.
  ReadPass::Gate gate = [] { return absl::OkStatus(); };
};

struct ConvertResult {
  uint64_t tensors = 0;
  uint64_t tied_names = 0;  // among them
  uint64_t bytes = 0;       // of elements
  size_t files = 0;
};

// Writes what `reader` reads to `out`, a piece at a time (a tensor, where `reader` has to gather
// it): under a temporary name beside it, which is synced and renamed, so that `out` is never seen
// but whole. On an error it is as before. A safetensors file gets the digest of every tensor, and
// kinds where `reader` knows them of all. ALREADY_EXISTS CHECKPOINT_EXISTS; INVALID_FIELD;
// NOT_REPRESENTABLE; those of reading and writing.
absl::StatusOr<ConvertResult> ConvertCheckpoint(const CheckpointReader& reader,
                                                const std::string& out,
                                                const ConvertOptions& options);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_CONVERT_CHECKPOINT_H_
