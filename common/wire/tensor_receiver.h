#ifndef MODELSTATE_COMMON_WIRE_TENSOR_RECEIVER_H_
#define MODELSTATE_COMMON_WIRE_TENSOR_RECEIVER_H_

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/digest.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"
#include "common/wire/part_codec.h"
#include "modelstate/v1/types.pb.h"

namespace modelstate {

// An entry of a table that arrived.
struct ReceivedTensor {
  TensorSpec spec;  // kind and requires_grad are defaults where the sender left them open
  std::optional<TensorKind> stated_kind;
  std::optional<bool> stated_requires_grad;
  // Elements that came in the table, as they lie in memory; such a tensor has no chunk bytes.
  std::optional<std::string> values;
  // How to fill it, with no bytes either; only with Options::allow_initializers. As it came: not
  // yet checked against the dtype and shape.
  std::optional<v1::Initializer> initializer;
  std::optional<uint64_t> stated_xxh3;
  // Bytes [offset, offset + spec.nbytes()) of the data region, when owns_bytes. Not so for inline
  // values, for an initializer, and for a tied tensor whose owner (or another name of the same
  // owner) is in the table: that has the owner's place.
  uint64_t offset = 0;
  bool owns_bytes = true;
};

// Who takes what arrives.
class TensorDestination {
 public:
  virtual ~TensorDestination() = default;

  // Once, when the table is complete and valid, before any byte: check names, admit memory.
  // `tensors` stays valid as long as the receiver.
  virtual absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) = 0;

  // Contiguous memory for the elements of tensor `index` (which owns bytes) from byte `offset` of
  // the tensor on: 1 to `max` bytes.
  virtual absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) = 0;

  // After bytes of tensor `index` from byte `offset` on were copied: `bytes` is the source, still
  // in the cache. In ascending order.
  virtual void OnBytes(size_t index, uint64_t offset, absl::Span<const uint8_t> bytes);

  // After all bytes of a chunk were copied.
  virtual absl::Status OnChunkDone(uint64_t offset, uint64_t length);
};

// The receiving side of a stream of tensors: header, table, chunks in ascending order without gaps,
// trailer. It checks order, counts, places and digests, so that Finished() means that everything
// that was announced arrived intact. Bytes of a tensor are hashed as they pass.
//
// Errors: CHUNK_INVALID for what breaks the order, the counts or the places, INVALID_FIELD for a
// table entry that is malformed or named twice, DIGEST_MISMATCH; each names the tensor. After an
// error the receiver is of no more use. Thread-compatible.
class TensorReceiver final : private ChunkSink {
 public:
  struct Options {
    // As the header says. Nothing is allocated by them: they are compared with what arrives.
    uint64_t tensor_count = 0;
    uint64_t total_bytes = 0;  // of the data region
    // Parts of the region that come, as ByteRangesFromProto gives them; empty: all of it.
    std::vector<ByteRange> ranges;
    // The places must be those of StateLayout, and its digest this one where not empty (what the
    // server sends). false: any places that tile the region (what the server takes).
    bool canonical_layout = false;
    std::string layout_digest;
    TensorKind default_kind = TensorKind::kParameter;
    bool allow_initializers = false;
    bool digests = true;  // false: bytes are not hashed; for who has asked the sender for none
    uint64_t max_tensors = 1000000;
    uint64_t max_table_bytes = uint64_t{256} << 20;  // of all table messages
    uint64_t max_chunk_bytes = UINT64_MAX;           // of one chunk's data
    uint64_t max_inline_bytes = uint64_t{16} << 20;  // elements of tensors with inline values
  };

  // `destination` is borrowed and outlives the receiver.
  explicit TensorReceiver(TensorDestination* destination)
      : destination_(destination), names_(0, NameHash{&tensors_}, NameEq{&tensors_}) {}
  TensorReceiver(const TensorReceiver&) = delete;
  TensorReceiver& operator=(const TensorReceiver&) = delete;
  ~TensorReceiver() override = default;

  // Takes one message of the stream. For kHeader it has filled `header`, and the caller calls Begin
  // before the next message.
  absl::StatusOr<PartKind> Receive(grpc::ByteBuffer* message,
                                   google::protobuf::MessageLite* header);
  absl::Status Begin(Options options);

  // What Receive does, for senders that are not a stream.
  absl::Status AddTable(const v1::TensorTable& part);
  absl::Status AddTrailer(const v1::Trailer& trailer);

  bool has_header() const { return state_ != State::kStart; }
  bool finished() const { return state_ == State::kFinished; }
  // When the stream ended: OK after a trailer, else CHUNK_INVALID that says what is missing.
  absl::Status CheckFinished() const;

  absl::Span<const ReceivedTensor> tensors() const { return tensors_; }
  uint64_t received_bytes() const { return received_bytes_; }
  // XXH3 of a tensor that came whole (in chunks of this stream, or inline); of a tied tensor its
  // owner's. nullopt: not, or not all of it.
  std::optional<uint64_t> digest(size_t index) const;
  // Tensors whose digest the sender gave and that agreed; an alias counts when the sender gave one.
  uint64_t verified_digests() const { return verified_digests_; }
  bool verified(size_t index) const { return index < verified_.size() && verified_[index]; }

 private:
  enum class State { kStart, kHeader, kTable, kChunks, kFinished };

  // Tensors by name and slot, which are those of the table: no copies of them.
  struct NameHash {
    const std::vector<ReceivedTensor>* tensors;
    size_t operator()(uint32_t index) const {
      const TensorSpec& spec = (*tensors)[index].spec;
      return absl::HashOf(spec.name, spec.slot);
    }
  };
  struct NameEq {
    const std::vector<ReceivedTensor>* tensors;
    bool operator()(uint32_t a, uint32_t b) const {
      const TensorSpec& first = (*tensors)[a].spec;
      const TensorSpec& second = (*tensors)[b].spec;
      return first.name == second.name && first.slot == second.slot;
    }
  };
  using NameSet = absl::flat_hash_set<uint32_t, NameHash, NameEq>;

  absl::Status OnChunk(uint64_t offset, uint64_t length) override;
  absl::Span<uint8_t> Destination(uint64_t offset, uint64_t max) override;
  absl::Status OnCopied(uint64_t offset, absl::Span<const uint8_t> bytes) override;

  absl::Status CompleteTable();
  absl::Status PlaceTensors();
  absl::Status TieTensors();
  absl::Status CheckLayout() const;
  absl::Status EnterRange();
  absl::Status FinishTensor(size_t index, uint64_t digest);
  void MarkVerified(size_t index);
  std::string name(size_t index) const { return DisplayName(tensors_[index].spec); }

  TensorDestination* const destination_;
  Options options_;
  State state_ = State::kStart;
  std::vector<ReceivedTensor> tensors_;
  NameSet names_;
  uint64_t table_bytes_ = 0;
  uint64_t inline_bytes_ = 0;

  // Tensors with bytes by offset, and for each tied tensor the one that has its bytes.
  std::vector<uint32_t> by_offset_;
  absl::flat_hash_map<uint32_t, uint32_t> owner_of_;

  // The next byte is next_offset_, in ranges[range_] and in tensor by_offset_[position_].
  size_t range_ = 0;
  size_t position_ = 0;
  uint64_t next_offset_ = 0;
  uint64_t received_bytes_ = 0;
  uint64_t expected_bytes_ = 0;

  // The tensor at position_ so far; only when its first byte was part of this stream.
  Xxh3Stream hash_;
  bool hashing_ = false;
  std::vector<uint64_t> digests_;
  std::vector<bool> has_digest_;
  std::vector<bool> verified_;
  uint64_t verified_digests_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_TENSOR_RECEIVER_H_
