#ifndef MODELSTATE_SERVER_RPC_STATE_STREAM_H_
#define MODELSTATE_SERVER_RPC_STATE_STREAM_H_

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/digest.h"
#include "common/base/state_layout.h"
#include "common/wire/part_codec.h"
#include "common/wire/table_splitter.h"
#include "modelstate/v1/state.pb.h"
#include "server/state/optimizer_tensors.h"
#include "server/state/snapshot.h"

namespace modelstate {

// The messages of one StreamStateDict answer, made one by one: header, table, chunks, trailer; or
// only a header that says not_modified.
//
// Chunks borrow the tensors' storages (a reference each, until gRPC has sent the bytes). What is
// cast to another dtype is cast once for all that hold the version, where the budget for casts has
// room, else for this stream; the single numbers of optimizer state are copied. A tensor whose
// digest is not known yet is hashed as its bytes pass, and the digest is kept with the storage:
// once per version, not per reader.
//
// Of a device whose memory the host does not see, the bytes of the next chunk are on their way to
// host memory while this one is sent; chunks borrow that memory. What is cast is cast for this
// stream alone then.
//
// Thread-compatible.
class StateStream {
 public:
  static constexpr uint64_t kDefaultChunkBytes = uint64_t{1} << 20;
  // A trailer with more digests would exceed what a default client accepts; those of further
  // tensors, where they are small, are in the table.
  static constexpr size_t kMaxDigests = 130000;
  static constexpr uint64_t kMaxTableDigestBytes = 64 << 10;  // of one tensor

  struct Options {
    std::string module;
    // Ascending, disjoint; empty: everything.
    std::vector<ByteRange> ranges;
    uint64_t chunk_bytes = kDefaultChunkBytes;
    bool skip_digests = false;
    std::shared_ptr<MemoryBudget> cast_budget;
  };

  struct Contents {
    Snapshot snapshot;  // what the storages are held by
    // For changed_since: the version that `view` is relative to, and the layout of the selection
    // that it is a part of.
    std::optional<Version> base;
    std::string selection_layout_digest;
    std::shared_ptr<const StateView> view;
    // Of the optimizer state in `view`: of its specs from indices.size() on.
    std::vector<OptimizerTensors::Value> optimizer;
  };

  // OUT_OF_RANGE RANGE_OUTSIDE_LAYOUT; RESOURCE_EXHAUSTED DEVICE_MEMORY, with a retry hint.
  static absl::StatusOr<std::unique_ptr<StateStream>> Create(Contents contents, Options options);

  // Only a header, which says that `version` is not newer than what the caller has. Holds nothing.
  // `view` null: it is not known, and its layout is left out.
  static std::unique_ptr<StateStream> NotModified(const std::string& module,
                                                  const ModuleVersion& version,
                                                  const StateView* view);

  // Hashes what the table is to say and the chunks do not: tensors of which the ranges take only a
  // part, and what a GPU holds beyond kMaxDigests. Reads all of their bytes, so call it off gRPC's
  // threads, before Next. `go_on` is asked now and then: false
  // ends it early. Errors are those of Next.
  absl::Status DigestParts(absl::FunctionRef<bool()> go_on);
  bool needs_digests() const { return !parts_.empty() || reads_for_table_; }

  // The next message; nullopt after the last. INTERNAL when the device failed.
  absl::StatusOr<std::optional<grpc::ByteBuffer>> Next();

 private:
  enum class Phase { kHeader, kTable, kChunks, kDone };

  StateStream(Contents contents, Options options, std::unique_ptr<HostReader> reader);
  explicit StateStream(grpc::ByteBuffer header);  // and nothing else

  v1::StatePart HeaderOfContents() const;
  void FillTableEntry(size_t index, v1::TensorInfo* info) const;
  // Bytes [begin, end) of the tensor at `index` of the view.
  struct Piece {
    uint32_t index;
    uint64_t begin;
    uint64_t end;
  };
  struct ChunkPlan {
    uint64_t offset = 0;
    std::vector<Piece> pieces;
  };
  // The chunk from `offset_` on, and goes on behind it. Without pieces: there are no more.
  ChunkPlan PlanChunk();
  // Chunks whose bytes come by one read, of a device whose memory the host does not see: a read
  // costs as much as a megabyte.
  struct Block {
    std::deque<ChunkPlan> chunks;
    std::shared_ptr<HostRead> read;
  };
  // Without chunks: there are no more.
  absl::StatusOr<Block> StartBlock();
  absl::StatusOr<std::optional<grpc::ByteBuffer>> NextChunk();
  void AddPiece(const Piece& piece);
  // Bytes [begin, end) of a storage. Of what was read: REQUIRES the order of StartBlock.
  absl::Span<const uint8_t> StoredBytes(const TensorStorage& storage, uint64_t begin, uint64_t end);
  // Bytes of a storage, as they are.
  void AddStored(const TensorStorage& storage, absl::Span<const uint8_t> bytes);
  void FinishRun();
  // The elements that a piece of a cast tensor touches, and the storage that they are of.
  struct CastPiece {
    const TensorStorage* source;
    DType from;
    uint64_t first;
    uint64_t last;
  };
  CastPiece FindCast(const Piece& piece) const;
  void Digest(uint32_t index, uint64_t begin, absl::Span<const uint8_t> bytes);
  // The module's tensor; nullopt: optimizer state.
  std::optional<uint32_t> schema_index(uint32_t index) const;
  // Tensors of which the ranges take a part, but not all.
  std::vector<uint32_t> FindParts() const;
  // The storage whose bytes are sent as they are; null: they are made for this stream.
  const TensorStorage* source(uint32_t index) const;
  // Of optimizer state that is a single number, kept in `contents_`.
  absl::Span<const uint8_t> ScalarBytes(uint32_t index) const;
  bool DigestIsInTable(uint32_t index) const;
  void AddCast(const Piece& piece);
  // The cast that readers share; null: there is no room for it.
  CastTensor* SharedCast(uint32_t index);
  std::optional<uint64_t> CachedDigest(uint32_t index);
  void CacheDigest(uint32_t index, uint64_t digest);
  std::optional<grpc::ByteBuffer> header_alone_;
  const Contents contents_;
  const StateView* const view_;  // contents_.view
  const Options options_;
  Phase phase_ = Phase::kHeader;
  std::vector<uint32_t> parts_;
  bool reads_for_table_ = false;
  absl::flat_hash_map<uint32_t, uint64_t> part_digests_;
  TableSplitter table_;
  ChunkEncoder encoder_;
  std::unique_ptr<HostReader> reader_;  // null: the host sees the storages
  std::optional<Block> next_block_;
  // At hand: its chunks that were not made yet, what was read and not yet used, and what goes on as
  // one slice.
  Block block_;
  absl::Span<const uint8_t> unused_;
  absl::Span<const uint8_t> run_;

  // The next byte: in ranges[range_], at `offset_`, of the tensor at by_offset()[position_].
  size_t range_ = 0;
  uint64_t offset_ = 0;
  size_t position_ = 0;
  uint64_t sent_bytes_ = 0;

  RefPtr<CastTensor> cast_;  // of the tensor at cast_index_, the last that was asked for
  std::optional<uint32_t> cast_index_;

  // Bytes of the tensor at hand that passed without a gap from its first.
  uint64_t contiguous_ = 0;
  std::optional<uint64_t> known_digest_;
  Xxh3Stream hash_;
  v1::StatePart trailer_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_STATE_STREAM_H_
