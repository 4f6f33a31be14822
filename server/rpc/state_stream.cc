#include "server/rpc/state_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "common/wire/convert.h"
#include "server/state/storage_blocks.h"

namespace modelstate {
namespace {

v1::StatePart MakeHeader(const std::string& module, const ModuleVersion& version,
                         const StateView* view) {
  v1::StatePart part;
  v1::Header* header = part.mutable_header();
  header->set_module(module);
  VersionToProto(version.version, header->mutable_version());
  header->set_step(version.step);
  header->set_schema_revision(version.schema->revision());
  if (view != nullptr) {
    header->set_layout_digest(view->layout.digest());
    header->set_tensor_count(view->specs.size());
    header->set_total_bytes(view->layout.total_bytes());
  }
  return part;
}

// Of one read: reaches 0.95 of one large copy.
constexpr uint64_t kBlockBytes = uint64_t{4} << 20;

// What the elements at both ends of a range may be more than the range.
constexpr uint64_t kCutElements = 1024;

// How many bytes of a tensor one byte of what is sent may be made of.
uint64_t LargestCast(const StateStream::Contents& contents) {
  uint64_t largest = 1;
  for (size_t i = 0; i < contents.view->indices.size(); ++i) {
    const DType from = contents.snapshot->schema->spec(contents.view->indices[i]).dtype;
    largest =
        std::max<uint64_t>(largest, DTypeSize(from) / DTypeSize(contents.view->specs[i].dtype));
  }
  return largest;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StateStream>> StateStream::Create(Contents contents,
                                                                 Options options) {
  const uint64_t total = contents.view->layout.total_bytes();
  for (const ByteRange& range : options.ranges) {
    if (range.end <= total) continue;
    return MakeError(Reason::kRangeOutsideLayout,
                     absl::StrCat("ranges: [", range.begin, ", ", range.end,
                                  ") reaches past the data region of this selection, which has ",
                                  total, " bytes; the header's total_bytes tells it"),
                     {{"begin", absl::StrCat(range.begin)},
                      {"end", absl::StrCat(range.end)},
                      {"total_bytes", absl::StrCat(total)}});
  }
  if (options.ranges.empty() && total > 0) options.ranges.push_back({0, total});
  Device& device = *contents.snapshot->device;
  std::unique_ptr<HostReader> reader;
  if (!device.host_visible() && total > 0) {
    const uint64_t block_bytes = std::min(total, std::max(options.chunk_bytes, kBlockBytes));
    const uint64_t cast = LargestCast(contents);
    MS_ASSIGN_OR_RETURN(
        reader, device.NewReader(cast == 1 ? block_bytes : block_bytes * cast + kCutElements));
  }
  return std::unique_ptr<StateStream>(
      new StateStream(std::move(contents), std::move(options), std::move(reader)));
}

StateStream::StateStream(Contents contents, Options options, std::unique_ptr<HostReader> reader)
    : contents_(std::move(contents)),
      view_(contents_.view.get()),
      options_(std::move(options)),
      table_(view_->specs.size(),
             [this](size_t index, v1::TensorInfo* info) { FillTableEntry(index, info); }),
      reader_(std::move(reader)) {
  if (!options_.ranges.empty()) {
    if (!options_.skip_digests) parts_ = FindParts();
    reads_for_table_ =
        reader_ != nullptr && !options_.skip_digests && view_->specs.size() > kMaxDigests;
    offset_ = options_.ranges.front().begin;
    position_ = view_->layout.FindPosition(offset_);
  }
}

std::unique_ptr<StateStream> StateStream::NotModified(const std::string& module,
                                                      const ModuleVersion& version,
                                                      const StateView* view) {
  v1::StatePart part = MakeHeader(module, version, view);
  part.mutable_header()->set_not_modified(true);
  return std::unique_ptr<StateStream>(new StateStream(SerializeMessage(part)));
}

v1::StatePart StateStream::HeaderOfContents() const {
  v1::StatePart part = MakeHeader(options_.module, *contents_.snapshot, view_);
  if (contents_.base) VersionToProto(*contents_.base, part.mutable_header()->mutable_base());
  part.mutable_header()->set_selection_layout_digest(contents_.selection_layout_digest);
  return part;
}

StateStream::StateStream(grpc::ByteBuffer header)
    : header_alone_(std::move(header)), view_(nullptr), table_(0, [](size_t, v1::TensorInfo*) {}) {}

void StateStream::FillTableEntry(size_t index, v1::TensorInfo* info) const {
  TensorSpecToProto(view_->specs[index], info);
  info->set_offset(view_->layout.range(index).begin);
  if (const std::optional<uint32_t> tensor = schema_index(index)) {
    info->set_changed_version(contents_.snapshot->changed_version[*tensor]);
  }
  const auto part = part_digests_.find(static_cast<uint32_t>(index));
  if (part != part_digests_.end()) {
    info->set_xxh3(DigestToHex(part->second));
  } else if (DigestIsInTable(static_cast<uint32_t>(index))) {
    const absl::StatusOr<uint64_t> digest = source(static_cast<uint32_t>(index))->Digest();
    if (digest.ok()) info->set_xxh3(DigestToHex(*digest));
  }
}

// Small ones: a table is made by gRPC's thread.
bool StateStream::DigestIsInTable(uint32_t index) const {
  return index >= kMaxDigests && !options_.skip_digests && source(index) != nullptr &&
         view_->specs[index].nbytes() <= kMaxTableDigestBytes;
}

std::vector<uint32_t> StateStream::FindParts() const {
  std::vector<uint32_t> parts;
  const auto add = [&](const ByteRange& range, uint64_t offset) {
    const uint32_t index = view_->layout.by_offset()[view_->layout.FindPosition(offset)];
    const ByteRange tensor = view_->layout.range(index);
    const bool whole = range.begin <= tensor.begin && tensor.end <= range.end;
    if (!whole && (parts.empty() || parts.back() != index)) parts.push_back(index);
  };
  for (const ByteRange& range : options_.ranges) {
    add(range, range.begin);
    add(range, range.end - 1);
  }
  return parts;
}

absl::Status StateStream::DigestParts(absl::FunctionRef<bool()> go_on) {
  const auto gate = [&] { return go_on() ? absl::OkStatus() : absl::CancelledError(); };
  if (reads_for_table_) {
    std::vector<const TensorStorage*> storages;
    for (uint32_t index = kMaxDigests; index < view_->specs.size(); ++index) {
      if (DigestIsInTable(index)) storages.push_back(source(index));
    }
    MS_RETURN_IF_ERROR(DigestStorages(storages, gate));
  }
  for (const uint32_t index : parts_) {
    std::optional<uint64_t> known = CachedDigest(index);
    if (!known && !schema_index(index) && source(index) == nullptr) {
      known = Xxh3(ScalarBytes(index));
    } else if (const TensorStorage* storage = source(index); !known && storage != nullptr) {
      MS_RETURN_IF_ERROR(DigestStorages({&storage, 1}, gate));
      known = storage->CachedDigest();
    } else if (!known) {
      const CastPiece whole = FindCast({index, 0, view_->specs[index].nbytes()});
      const DType to = view_->specs[index].dtype;
      Xxh3Stream hash;
      std::vector<uint8_t> cast;
      MS_RETURN_IF_ERROR(ReadBlocks(
          {&whole.source, 1},
          [&](absl::Span<const BlockPart>, absl::Span<const uint8_t> bytes) -> absl::Status {
            MS_RETURN_IF_ERROR(gate());
            const uint64_t count = bytes.size() / DTypeSize(whole.from);
            cast.resize(count * DTypeSize(to));
            CastElements(whole.from, bytes.data(), to, cast.data(), static_cast<int64_t>(count));
            hash.Update(cast);
            return absl::OkStatus();
          }));
      known = hash.Digest();
      CacheDigest(index, *known);
    }
    part_digests_.emplace(index, *known);
  }
  return absl::OkStatus();
}

std::optional<uint32_t> StateStream::schema_index(uint32_t index) const {
  if (index >= view_->indices.size()) return std::nullopt;
  return view_->indices[index];
}

const TensorStorage* StateStream::source(uint32_t index) const {
  const std::optional<uint32_t> tensor = schema_index(index);
  if (!tensor) return contents_.optimizer[index - view_->indices.size()].storage.get();
  const ModuleVersion& version = *contents_.snapshot;
  const bool cast = view_->specs[index].dtype != version.schema->spec(*tensor).dtype;
  return cast ? nullptr : version.storages[*tensor].get();
}

absl::StatusOr<std::optional<grpc::ByteBuffer>> StateStream::Next() {
  switch (phase_) {
    case Phase::kHeader:
      phase_ = header_alone_ ? Phase::kDone : Phase::kTable;
      if (header_alone_) return std::move(header_alone_);
      return SerializeMessage(HeaderOfContents());
    case Phase::kTable: {
      v1::StatePart part;
      if (table_.Next(part.mutable_tensors())) return SerializeMessage(part);
      phase_ = Phase::kChunks;
      [[fallthrough]];
    }
    case Phase::kChunks: {
      MS_ASSIGN_OR_RETURN(std::optional<grpc::ByteBuffer> chunk, NextChunk());
      if (chunk) return chunk;
      phase_ = Phase::kDone;
      trailer_.mutable_trailer()->set_total_bytes(sent_bytes_);
      return SerializeMessage(trailer_);
    }
    case Phase::kDone:
      return std::nullopt;
  }
  return std::nullopt;
}

StateStream::ChunkPlan StateStream::PlanChunk() {
  ChunkPlan plan;
  if (range_ == options_.ranges.size()) return plan;
  const ByteRange& range = options_.ranges[range_];
  const uint64_t end = std::min(range.end, offset_ + options_.chunk_bytes);
  plan.offset = offset_;
  while (offset_ < end) {
    const uint32_t index = view_->layout.by_offset()[position_];
    const ByteRange tensor = view_->layout.range(index);
    const uint64_t piece_end = std::min(end, tensor.end);
    if (piece_end > offset_) {
      plan.pieces.push_back({index, offset_ - tensor.begin, piece_end - tensor.begin});
    }
    offset_ = std::max(offset_, piece_end);
    if (offset_ >= tensor.end) ++position_;
  }
  if (offset_ == range.end && ++range_ < options_.ranges.size()) {
    offset_ = options_.ranges[range_].begin;
    position_ = view_->layout.FindPosition(offset_);
  }
  return plan;
}

absl::StatusOr<StateStream::Block> StateStream::StartBlock() {
  Block block;
  std::vector<BufferRange> ranges;
  for (uint64_t bytes = 0; bytes == 0 || bytes + options_.chunk_bytes <= kBlockBytes;) {
    ChunkPlan chunk = PlanChunk();
    if (chunk.pieces.empty()) break;
    for (const Piece& piece : chunk.pieces) {
      bytes += piece.end - piece.begin;
      if (const TensorStorage* storage = source(piece.index)) {
        ranges.push_back({&storage->buffer(), piece.begin, piece.end - piece.begin});
      } else if (schema_index(piece.index)) {
        const CastPiece cast = FindCast(piece);
        const uint64_t width = DTypeSize(cast.from);
        ranges.push_back(
            {&cast.source->buffer(), cast.first * width, (cast.last - cast.first) * width});
      }
    }
    block.chunks.push_back(std::move(chunk));
  }
  if (!block.chunks.empty()) {
    MS_ASSIGN_OR_RETURN(block.read, reader_->Start(ranges));
  }
  return block;
}

absl::StatusOr<std::optional<grpc::ByteBuffer>> StateStream::NextChunk() {
  ChunkPlan plan;
  if (reader_ == nullptr) {
    plan = PlanChunk();
  } else {
    if (block_.chunks.empty()) {
      if (!next_block_) {
        MS_ASSIGN_OR_RETURN(next_block_, StartBlock());
      }
      block_ = *std::exchange(next_block_, std::nullopt);
      if (block_.chunks.empty()) return std::nullopt;
      MS_ASSIGN_OR_RETURN(next_block_, StartBlock());
      MS_ASSIGN_OR_RETURN(unused_, block_.read->Wait());
    }
    plan = std::move(block_.chunks.front());
    block_.chunks.pop_front();
  }
  if (plan.pieces.empty()) return std::nullopt;
  encoder_.Begin(plan.offset);
  for (const Piece& piece : plan.pieces) AddPiece(piece);
  FinishRun();
  sent_bytes_ += encoder_.size();
  return encoder_.Finish();
}

void StateStream::AddPiece(const Piece& piece) {
  if (const TensorStorage* storage = source(piece.index)) {
    const absl::Span<const uint8_t> bytes = StoredBytes(*storage, piece.begin, piece.end);
    Digest(piece.index, piece.begin, bytes);
    AddStored(*storage, bytes);
    return;
  }
  FinishRun();
  if (schema_index(piece.index)) {
    AddCast(piece);
  } else {
    const auto bytes = ScalarBytes(piece.index).subspan(piece.begin, piece.end - piece.begin);
    Digest(piece.index, piece.begin, bytes);
    encoder_.AddCopied(bytes);
  }
}

absl::Span<const uint8_t> StateStream::StoredBytes(const TensorStorage& storage, uint64_t begin,
                                                   uint64_t end) {
  if (reader_ == nullptr) return storage.HostBytes().subspan(begin, end - begin);
  const absl::Span<const uint8_t> bytes = unused_.subspan(0, end - begin);
  unused_.remove_prefix(end - begin);
  return bytes;
}

void StateStream::AddStored(const TensorStorage& storage, absl::Span<const uint8_t> bytes) {
  if (reader_ == nullptr) {
    storage.Ref();
    encoder_.AddBorrowed(
        bytes, [](void* storage) { static_cast<const TensorStorage*>(storage)->Unref(); },
        const_cast<TensorStorage*>(&storage));
  } else if (!run_.empty() && run_.data() + run_.size() == bytes.data()) {
    run_ = {run_.data(), run_.size() + bytes.size()};
  } else {
    FinishRun();
    run_ = bytes;
  }
}

void StateStream::FinishRun() {
  const absl::Span<const uint8_t> run = std::exchange(run_, {});
  if (run.empty()) return;
  encoder_.AddBorrowed(
      run, [](void* read) { delete static_cast<std::shared_ptr<HostRead>*>(read); },
      new std::shared_ptr<HostRead>(block_.read));
}

absl::Span<const uint8_t> StateStream::ScalarBytes(uint32_t index) const {
  const float& scalar = contents_.optimizer[index - view_->indices.size()].scalar;
  return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(&scalar), sizeof(scalar));
}

StateStream::CastPiece StateStream::FindCast(const Piece& piece) const {
  const uint32_t tensor = view_->indices[piece.index];
  // A range may begin or end inside an element.
  const uint64_t width = DTypeSize(view_->specs[piece.index].dtype);
  return {contents_.snapshot->storages[tensor].get(),
          contents_.snapshot->schema->spec(tensor).dtype, piece.begin / width,
          (piece.end + width - 1) / width};
}

void StateStream::AddCast(const Piece& piece) {
  const CastPiece part = FindCast(piece);
  if (CastTensor* shared = SharedCast(piece.index)) {
    const absl::Span<const uint8_t> bytes =
        shared->Get(part.source->HostBytes(), piece.begin, piece.end);
    if (!bytes.empty()) {
      Digest(piece.index, piece.begin, bytes);
      shared->Ref();
      encoder_.AddBorrowed(
          bytes, [](void* cast) { static_cast<const CastTensor*>(cast)->Unref(); }, shared);
      return;
    }
  }
  const DType to = view_->specs[piece.index].dtype;
  const uint64_t count = part.last - part.first;
  const absl::Span<const uint8_t> elements = StoredBytes(
      *part.source, part.first * DTypeSize(part.from), part.last * DTypeSize(part.from));
  auto* cast = new std::vector<uint8_t>(count * DTypeSize(to));
  CastElements(part.from, elements.data(), to, cast->data(), static_cast<int64_t>(count));
  const auto bytes = absl::MakeConstSpan(*cast).subspan(piece.begin - part.first * DTypeSize(to),
                                                        piece.end - piece.begin);
  Digest(piece.index, piece.begin, bytes);
  encoder_.AddBorrowed(
      bytes, [](void* vector) { delete static_cast<std::vector<uint8_t>*>(vector); }, cast);
}

CastTensor* StateStream::SharedCast(uint32_t index) {
  if (reader_ != nullptr) return nullptr;
  if (cast_index_ != index) {
    const uint32_t tensor = view_->indices[index];
    const ModuleSchema& schema = *contents_.snapshot->schema;
    cast_index_ = index;
    cast_ = contents_.snapshot.casts().Find(schema.owner(tensor), schema.spec(tensor).dtype,
                                            view_->specs[index].dtype, view_->specs[index].nbytes(),
                                            *options_.cast_budget);
  }
  return cast_.get();
}

std::optional<uint64_t> StateStream::CachedDigest(uint32_t index) {
  if (const TensorStorage* storage = source(index)) return storage->CachedDigest();
  if (!schema_index(index)) return std::nullopt;
  const CastTensor* cast = SharedCast(index);
  return cast == nullptr ? std::nullopt : cast->CachedDigest();
}

void StateStream::CacheDigest(uint32_t index, uint64_t digest) {
  if (const TensorStorage* storage = source(index)) return storage->CacheDigest(digest);
  if (!schema_index(index)) return;
  if (CastTensor* cast = SharedCast(index)) cast->CacheDigest(digest);
}

void StateStream::Digest(uint32_t index, uint64_t begin, absl::Span<const uint8_t> bytes) {
  if (options_.skip_digests || DigestIsInTable(index)) return;
  if (begin == 0) {
    contiguous_ = 0;
    known_digest_ = CachedDigest(index);
    hash_.Reset();
  } else if (begin != contiguous_ || contiguous_ == 0) {
    contiguous_ = 0;  // not from its first byte on: it will have no digest
    return;
  }
  contiguous_ += bytes.size();
  if (!known_digest_) hash_.Update(bytes);
  if (contiguous_ < view_->specs[index].nbytes()) return;
  contiguous_ = 0;
  if (!known_digest_) {
    known_digest_ = hash_.Digest();
    CacheDigest(index, *known_digest_);
  }
  v1::Trailer* trailer = trailer_.mutable_trailer();
  if (static_cast<size_t>(trailer->digests_size()) >= kMaxDigests) return;
  v1::TensorDigest* digest = trailer->add_digests();
  digest->set_index(index);
  digest->set_xxh3(DigestToHex(*known_digest_));
}

}  // namespace modelstate
