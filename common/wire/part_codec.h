#ifndef MODELSTATE_COMMON_WIRE_PART_CODEC_H_
#define MODELSTATE_COMMON_WIRE_PART_CODEC_H_

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "modelstate/v1/types.pb.h"

// StatePart, LoadPart and StepPart have the same shape: a oneof of header (1), tensors (2), chunk
// (3) and trailer (4). One codec serves them all; on the wire they are plain protobuf messages.
namespace modelstate {

// Encodes a message with a chunk whose payload is slices that borrow tensor storage: no byte of a
// large piece is copied here. Reusable; thread-compatible.
class ChunkEncoder {
 public:
  using Release = void (*)(void* user_data);

  // Pieces below this are copied together into one slice: a slice costs more than such a copy.
  static constexpr size_t kCopyBelow = 4096;

  // Starts a chunk at `offset` of the data region; what was not finished is dropped (and released).
  void Begin(uint64_t offset);

  // Appends bytes that stay valid and unchanged until `release(user_data)`, which happens exactly
  // once: when gRPC has sent the piece or dropped the message, on any thread; at once for a piece
  // below kCopyBelow.
  void AddBorrowed(absl::Span<const uint8_t> bytes, Release release, void* user_data);

  // Appends a copy.
  void AddCopied(absl::Span<const uint8_t> bytes);

  // Payload bytes since Begin.
  uint64_t size() const { return size_; }

  // The message, payload last. Needs a new Begin afterwards.
  grpc::ByteBuffer Finish();

 private:
  void FlushCopied();

  uint64_t offset_ = 0;
  uint64_t size_ = 0;
  std::string copied_;
  std::vector<grpc::Slice> slices_;
};

// Any other message, serialized as gRPC does.
grpc::ByteBuffer SerializeMessage(const google::protobuf::MessageLite& message);

// Where a decoder puts the payload of chunks.
class ChunkSink {
 public:
  virtual ~ChunkSink() = default;

  // Before any byte of a chunk is taken: whether it may come, and fits. An error ends the decoding.
  virtual absl::Status OnChunk(uint64_t offset, uint64_t length) = 0;

  // The next contiguous piece of memory for the bytes from `offset` of the data region: 1 to `max`
  // bytes. Only called for bytes that OnChunk has allowed, in ascending order.
  virtual absl::Span<uint8_t> Destination(uint64_t offset, uint64_t max) = 0;

  // After bytes were copied to their destination: `bytes` is the source, still in the cache.
  virtual absl::Status OnCopied(uint64_t offset, absl::Span<const uint8_t> bytes) = 0;
};

enum class PartKind { kHeader, kTable, kChunk, kTrailer };

// Takes one message apart. Parses into `header` (the part type's own header message), `table` or
// `trailer`, each of which must be empty, or copies the payload of a chunk straight to `sink`.
// Fields may come in any order, unknown ones are skipped. CHUNK_INVALID for malformed bytes, a
// message with no part or with two. Errors of `sink` pass through. None of the pointers may be
// null.
absl::StatusOr<PartKind> DecodePart(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* header,
                                    v1::TensorTable* table, v1::Trailer* trailer, ChunkSink* sink);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_PART_CODEC_H_
