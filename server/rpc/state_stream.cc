#include "server/rpc/state_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "common/wire/convert.h"

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
  return std::unique_ptr<StateStream>(new StateStream(std::move(contents), std::move(options)));
}

StateStream::StateStream(Contents contents, Options options)
    : contents_(std::move(contents)),
      view_(contents_.view.get()),
      options_(std::move(options)),
      table_(view_->specs.size(),
             [this](size_t index, v1::TensorInfo* info) { FillTableEntry(index, info); }) {
  if (!options_.ranges.empty()) {
    if (!options_.skip_digests) parts_ = FindParts();
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

void StateStream::DigestParts(absl::FunctionRef<bool()> go_on) {
  for (const uint32_t index : parts_) {
    const uint64_t nbytes = view_->specs[index].nbytes();
    const TensorStorage* storage = source(index);
    std::optional<uint64_t> known = CachedDigest(index);
    if (storage == nullptr && !schema_index(index)) known = Xxh3(ScalarBytes(index));
    Xxh3Stream hash;
    std::vector<uint8_t> cast;
    for (uint64_t begin = 0; !known && begin < nbytes; begin += kDefaultChunkBytes) {
      if (!go_on()) return;
      const uint64_t size = std::min(kDefaultChunkBytes, nbytes - begin);
      if (storage != nullptr) {
        hash.Update(storage->HostBytes().subspan(begin, size));
        continue;
      }
      cast.resize(size);
      const uint64_t width = DTypeSize(view_->specs[index].dtype);
      Cast(index, begin / width, (begin + size) / width, cast.data());
      hash.Update(cast);
    }
    if (!known) {
      known = hash.Digest();
      CacheDigest(index, *known);
    }
    part_digests_.emplace(index, *known);
  }
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

std::optional<grpc::ByteBuffer> StateStream::Next() {
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
    case Phase::kChunks:
      if (range_ < options_.ranges.size()) return NextChunk();
      phase_ = Phase::kDone;
      trailer_.mutable_trailer()->set_total_bytes(sent_bytes_);
      return SerializeMessage(trailer_);
    case Phase::kDone:
      return std::nullopt;
  }
  return std::nullopt;
}

grpc::ByteBuffer StateStream::NextChunk() {
  const ByteRange& range = options_.ranges[range_];
  const uint64_t end = std::min(range.end, offset_ + options_.chunk_bytes);
  encoder_.Begin(offset_);
  while (offset_ < end) {
    const uint32_t index = view_->layout.by_offset()[position_];
    const ByteRange tensor = view_->layout.range(index);
    const uint64_t piece_end = std::min(end, tensor.end);
    if (piece_end > offset_) AddPiece(index, offset_ - tensor.begin, piece_end - tensor.begin);
    offset_ = std::max(offset_, piece_end);
    if (offset_ >= tensor.end) ++position_;
  }
  sent_bytes_ += encoder_.size();
  if (offset_ == range.end && ++range_ < options_.ranges.size()) {
    offset_ = options_.ranges[range_].begin;
    position_ = view_->layout.FindPosition(offset_);
  }
  return encoder_.Finish();
}

void StateStream::AddPiece(uint32_t index, uint64_t begin, uint64_t end) {
  const uint64_t size = end - begin;
  if (const TensorStorage* storage = source(index)) {
    const absl::Span<const uint8_t> bytes = storage->HostBytes().subspan(begin, size);
    Digest(index, begin, bytes);
    storage->Ref();
    encoder_.AddBorrowed(
        bytes, [](void* storage) { static_cast<const TensorStorage*>(storage)->Unref(); },
        const_cast<TensorStorage*>(storage));
  } else if (schema_index(index)) {
    AddCast(index, begin, end);
  } else {
    const auto bytes = ScalarBytes(index).subspan(begin, size);
    Digest(index, begin, bytes);
    encoder_.AddCopied(bytes);
  }
}

absl::Span<const uint8_t> StateStream::ScalarBytes(uint32_t index) const {
  const float& scalar = contents_.optimizer[index - view_->indices.size()].scalar;
  return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(&scalar), sizeof(scalar));
}

void StateStream::AddCast(uint32_t index, uint64_t begin, uint64_t end) {
  if (CastTensor* shared = SharedCast(index)) {
    const uint32_t tensor = view_->indices[index];
    const absl::Span<const uint8_t> bytes =
        shared->Get(contents_.snapshot->storages[tensor]->HostBytes(), begin, end);
    if (!bytes.empty()) {
      Digest(index, begin, bytes);
      shared->Ref();
      encoder_.AddBorrowed(
          bytes, [](void* cast) { static_cast<const CastTensor*>(cast)->Unref(); }, shared);
      return;
    }
  }
  // A range may begin or end inside an element: cast the elements that it touches.
  const uint64_t width = DTypeSize(view_->specs[index].dtype);
  const uint64_t first = begin / width;
  const uint64_t last = (end + width - 1) / width;
  auto* cast = new std::vector<uint8_t>((last - first) * width);
  Cast(index, first, last, cast->data());
  const auto bytes = absl::MakeConstSpan(*cast).subspan(begin - first * width, end - begin);
  Digest(index, begin, bytes);
  encoder_.AddBorrowed(
      bytes, [](void* vector) { delete static_cast<std::vector<uint8_t>*>(vector); }, cast);
}

CastTensor* StateStream::SharedCast(uint32_t index) {
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

void StateStream::Cast(uint32_t index, uint64_t first, uint64_t last, uint8_t* out) const {
  const uint32_t tensor = view_->indices[index];
  const DType from = contents_.snapshot->schema->spec(tensor).dtype;
  const uint8_t* elements = contents_.snapshot->storages[tensor]->HostBytes().data();
  CastElements(from, elements + first * DTypeSize(from), view_->specs[index].dtype, out,
               static_cast<int64_t>(last - first));
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
