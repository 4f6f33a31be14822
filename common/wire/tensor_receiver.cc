#include "common/wire/tensor_receiver.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/values_codec.h"

namespace modelstate {
namespace {

absl::Status OrderError(absl::string_view text, ErrorMetadata metadata = {}) {
  return MakeError(Reason::kChunkInvalid, text, std::move(metadata));
}

std::string Text(uint64_t number) { return absl::StrCat(number); }

const char* PartName(PartKind kind) {
  switch (kind) {
    case PartKind::kHeader:
      return "a header";
    case PartKind::kTable:
      return "a part of the tensor table";
    case PartKind::kChunk:
      return "a chunk";
    case PartKind::kTrailer:
      return "the trailer";
  }
  return "a message";
}

absl::Status CheckInitializer(const v1::TensorInfo& info, bool allowed) {
  const char* problem = nullptr;
  if (!allowed) {
    problem = "has an initializer, which CreateModule and LoadStateDict take; send its elements";
  } else if (info.has_values()) {
    problem = "has both values and an initializer; give one";
  } else if (!info.xxh3().empty()) {
    problem = "has both an xxh3 and an initializer; leave the digest out";
  }
  if (problem == nullptr) return absl::OkStatus();
  return MakeError(Reason::kInvalidField, absl::StrCat("tensor \"", info.name(), "\" ", problem),
                   {{"tensor", info.name()}});
}

absl::Status NoHeader(PartKind kind) {
  return OrderError(absl::StrCat(PartName(kind), " came before the header; send the header first"));
}

}  // namespace

void TensorDestination::OnBytes(size_t, uint64_t, absl::Span<const uint8_t>) {}

absl::Status TensorDestination::OnChunkDone(uint64_t, uint64_t) { return absl::OkStatus(); }

absl::StatusOr<PartKind> TensorReceiver::Receive(grpc::ByteBuffer* message,
                                                 google::protobuf::MessageLite* header) {
  v1::TensorTable table;
  v1::Trailer trailer;
  const uint64_t before = received_bytes_;
  const uint64_t chunk_offset = next_offset_;
  MS_ASSIGN_OR_RETURN(const PartKind kind, DecodePart(message, header, &table, &trailer, this));
  switch (kind) {
    case PartKind::kHeader:
      if (has_header()) return OrderError("a second header came; a stream has one");
      break;
    case PartKind::kTable:
      MS_RETURN_IF_ERROR(AddTable(table));
      break;
    case PartKind::kChunk:
      if (received_bytes_ > before) {
        MS_RETURN_IF_ERROR(destination_->OnChunkDone(chunk_offset, received_bytes_ - before));
        MS_RETURN_IF_ERROR(EnterRange());
      }
      break;
    case PartKind::kTrailer:
      MS_RETURN_IF_ERROR(AddTrailer(trailer));
      break;
  }
  return kind;
}

absl::Status TensorReceiver::Begin(Options options) {
  if (has_header()) return OrderError("a second header came; a stream has one");
  if (options.tensor_count > options.max_tensors) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("tensor_count is ", options.tensor_count, "; at most ",
                                  options.max_tensors, " are taken here"));
  }
  options_ = std::move(options);
  if (options_.ranges.empty() && options_.total_bytes > 0) {
    options_.ranges.push_back({0, options_.total_bytes});
  }
  for (const ByteRange& range : options_.ranges) {
    if (range.begin >= range.end || range.end > options_.total_bytes) {
      return MakeError(
          Reason::kRangeOutsideLayout,
          absl::StrCat("bytes [", range.begin, ", ", range.end,
                       ") are no part of the data region of ", options_.total_bytes, " bytes"));
    }
    expected_bytes_ += range.size();
  }
  state_ = State::kHeader;
  return absl::OkStatus();
}

absl::Status TensorReceiver::AddTable(const v1::TensorTable& part) {
  if (state_ == State::kStart) return NoHeader(PartKind::kTable);
  if (state_ != State::kHeader) {
    return OrderError(absl::StrCat("a part of the tensor table came after the table was complete (",
                                   tensors_.size(), " tensors)"),
                      {{"tensor_count", Text(options_.tensor_count)}});
  }
  table_bytes_ += part.ByteSizeLong();
  if (table_bytes_ > options_.max_table_bytes) {
    return OrderError(absl::StrCat("the tensor table exceeds ", options_.max_table_bytes,
                                   " bytes after ", tensors_.size(), " tensors"),
                      {{"max_table_bytes", Text(options_.max_table_bytes)}});
  }
  for (const v1::TensorInfo& info : part.tensors()) {
    if (tensors_.size() == options_.tensor_count) {
      return OrderError(absl::StrCat("the table has more tensors than the ", options_.tensor_count,
                                     " of the header's tensor_count; the first of these is \"",
                                     info.name(), "\""),
                        {{"tensor", info.name()}, {"tensor_count", Text(options_.tensor_count)}});
    }
    ReceivedTensor tensor;
    MS_ASSIGN_OR_RETURN(tensor.spec, TensorSpecFromProto(info, options_.default_kind));
    if (info.kind() != v1::TENSOR_KIND_UNSPECIFIED) tensor.stated_kind = tensor.spec.kind;
    if (info.has_requires_grad()) tensor.stated_requires_grad = info.requires_grad();
    tensor.offset = info.offset();
    if (!info.xxh3().empty()) {
      tensor.stated_xxh3 = DigestFromHex(info.xxh3());
      if (!tensor.stated_xxh3) {
        return MakeError(
            Reason::kInvalidField,
            absl::StrCat("tensor \"", info.name(), "\": xxh3 is not 16 lower-case hex digits"));
      }
    }
    if (info.has_values()) {
      // The encoding is at most 8 times the message, which is bounded; so check after it.
      std::string values;
      absl::Status encoded =
          EncodeValues(info.values(), tensor.spec.dtype, tensor.spec.shape.num_elements(), &values);
      if (!encoded.ok()) return Annotate(encoded, absl::StrCat("tensor \"", info.name(), "\""));
      inline_bytes_ += values.size();
      if (inline_bytes_ > options_.max_inline_bytes) {
        return OrderError(
            absl::StrCat("tensor \"", info.name(), "\": inline values exceed ",
                         options_.max_inline_bytes, " bytes together; send the elements in chunks"),
            {{"tensor", info.name()}, {"max_inline_bytes", Text(options_.max_inline_bytes)}});
      }
      tensor.values = std::move(values);
      tensor.owns_bytes = false;
    }
    if (info.has_initializer()) {
      MS_RETURN_IF_ERROR(CheckInitializer(info, options_.allow_initializers));
      tensor.initializer = info.initializer();
      tensor.owns_bytes = false;
    }
    tensors_.push_back(std::move(tensor));
    if (!names_.insert(static_cast<uint32_t>(tensors_.size() - 1)).second) {
      const TensorSpec& spec = tensors_.back().spec;
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("tensor \"", DisplayName(spec), "\" comes twice in the table"),
                       {{"tensor", spec.name}});
    }
  }
  if (tensors_.size() == options_.tensor_count && options_.tensor_count > 0) return CompleteTable();
  return absl::OkStatus();
}

absl::Status TensorReceiver::CompleteTable() {
  MS_RETURN_IF_ERROR(PlaceTensors());
  digests_.resize(tensors_.size());
  has_digest_.resize(tensors_.size());
  verified_.resize(tensors_.size());
  MS_RETURN_IF_ERROR(destination_->OnTable(tensors_));
  state_ = State::kTable;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const ReceivedTensor& tensor = tensors_[i];
    if (tensor.values) {
      MS_RETURN_IF_ERROR(FinishTensor(i, Xxh3(AsBytes(*tensor.values))));
    } else if (tensor.owns_bytes && tensor.spec.nbytes() == 0) {
      MS_RETURN_IF_ERROR(FinishTensor(i, Xxh3({})));
    }
  }
  if (!options_.ranges.empty()) next_offset_ = options_.ranges[0].begin;
  return EnterRange();
}

// Tied names share the place of the first of them that is in the table.
absl::Status TensorReceiver::TieTensors() {
  const bool has_ties =
      std::any_of(tensors_.begin(), tensors_.end(),
                  [](const ReceivedTensor& each) { return each.spec.is_alias(); });
  if (!has_ties) return absl::OkStatus();
  absl::flat_hash_map<std::pair<absl::string_view, absl::string_view>, uint32_t> first_of_owner;
  for (uint32_t i = 0; i < tensors_.size(); ++i) {
    ReceivedTensor& tensor = tensors_[i];
    const std::string& owner = tensor.spec.is_alias() ? tensor.spec.alias_of : tensor.spec.name;
    const std::pair<absl::string_view, absl::string_view> key(owner, tensor.spec.slot);
    const auto [it, inserted] = first_of_owner.emplace(key, i);
    if (inserted) continue;
    const ReceivedTensor& other = tensors_[it->second];
    if (other.spec.dtype != tensor.spec.dtype || other.spec.shape != tensor.spec.shape) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("tensor \"", tensor.spec.name, "\" is tied to \"",
                                    other.spec.name, "\" but differs from it in dtype or shape"));
    }
    tensor.owns_bytes = false;
    tensor.offset = other.offset;
    owner_of_.emplace(i, it->second);
  }
  return absl::OkStatus();
}

// The places are those of StateLayout.
absl::Status TensorReceiver::CheckLayout() const {
  uint64_t sum = 0;
  for (const ReceivedTensor& tensor : tensors_) {
    if (!tensor.owns_bytes) continue;
    if (tensor.spec.nbytes() > options_.total_bytes - sum) {
      return OrderError(
          absl::StrCat("tensor \"", DisplayName(tensor.spec),
                       "\" ends beyond the header's total_bytes of ", options_.total_bytes),
          {{"tensor", tensor.spec.name}, {"total_bytes", Text(options_.total_bytes)}});
    }
    sum += tensor.spec.nbytes();
  }
  const StateLayout layout(
      tensors_.size(), [this](size_t i) -> const TensorSpec& { return tensors_[i].spec; },
      by_offset_);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (tensors_[i].owns_bytes && tensors_[i].offset != layout.range(i).begin) {
      return OrderError(absl::StrCat("tensor \"", name(i), "\" has offset ", tensors_[i].offset,
                                     ", the layout's is ", layout.range(i).begin),
                        {{"tensor", name(i)},
                         {"offset", Text(tensors_[i].offset)},
                         {"expected_offset", Text(layout.range(i).begin)}});
    }
  }
  if (!options_.layout_digest.empty() && layout.digest() != options_.layout_digest) {
    return MakeError(Reason::kLayoutMismatch,
                     absl::StrCat("the table's layout has digest ", layout.digest(),
                                  ", the header says ", options_.layout_digest));
  }
  return absl::OkStatus();
}

absl::Status TensorReceiver::PlaceTensors() {
  MS_RETURN_IF_ERROR(TieTensors());
  struct Place {
    uint64_t offset;
    uint64_t nbytes;
    uint32_t index;
    // Those without bytes come first, so that they never lie inside another.
    bool operator<(const Place& other) const {
      return std::tie(offset, nbytes) < std::tie(other.offset, other.nbytes);
    }
  };
  std::vector<Place> places;
  places.reserve(tensors_.size());
  for (uint32_t i = 0; i < tensors_.size(); ++i) {
    const ReceivedTensor& tensor = tensors_[i];
    if (tensor.owns_bytes) places.push_back({tensor.offset, tensor.spec.nbytes(), i});
  }
  std::sort(places.begin(), places.end());
  by_offset_.reserve(places.size());
  for (const Place& place : places) by_offset_.push_back(place.index);

  if (options_.canonical_layout) MS_RETURN_IF_ERROR(CheckLayout());
  uint64_t end = 0;
  for (uint32_t i : by_offset_) {
    const ReceivedTensor& tensor = tensors_[i];
    if (tensor.offset != end) {
      return OrderError(
          absl::StrCat("tensor \"", DisplayName(tensor.spec), "\" has offset ", tensor.offset,
                       ", where ", end, " is due: the tensors with chunks fill [0, ",
                       options_.total_bytes, ") without gap or overlap"),
          {{"tensor", tensor.spec.name},
           {"offset", Text(tensor.offset)},
           {"expected_offset", Text(end)}});
    }
    if (tensor.spec.nbytes() > options_.total_bytes - end) {
      return OrderError(
          absl::StrCat("tensor \"", DisplayName(tensor.spec),
                       "\" ends beyond the header's total_bytes of ", options_.total_bytes),
          {{"tensor", tensor.spec.name}, {"total_bytes", Text(options_.total_bytes)}});
    }
    end += tensor.spec.nbytes();
  }
  if (end != options_.total_bytes) {
    return OrderError(
        absl::StrCat("the tensors of the table have ", end,
                     " bytes in chunks, the header's total_bytes is ", options_.total_bytes),
        {{"table_bytes", Text(end)}, {"total_bytes", Text(options_.total_bytes)}});
  }
  // Tensors without bytes are done already and would only be in the way.
  by_offset_.erase(std::remove_if(by_offset_.begin(), by_offset_.end(),
                                  [this](uint32_t i) { return tensors_[i].spec.nbytes() == 0; }),
                   by_offset_.end());
  return absl::OkStatus();
}

// Where a range is used up, goes to the next; then position_ is the tensor of next_offset_.
absl::Status TensorReceiver::EnterRange() {
  while (range_ < options_.ranges.size() && next_offset_ == options_.ranges[range_].end) {
    if (++range_ < options_.ranges.size()) next_offset_ = options_.ranges[range_].begin;
    hashing_ = false;
  }
  if (range_ == options_.ranges.size()) return absl::OkStatus();
  const auto ends_before = [this](uint32_t i) {
    return tensors_[i].offset + tensors_[i].spec.nbytes() <= next_offset_;
  };
  if (position_ < by_offset_.size() && ends_before(by_offset_[position_])) {
    position_ = static_cast<size_t>(
        std::partition_point(by_offset_.begin() + static_cast<int64_t>(position_), by_offset_.end(),
                             ends_before) -
        by_offset_.begin());
    hashing_ = false;
  }
  return absl::OkStatus();
}

absl::Status TensorReceiver::OnChunk(uint64_t offset, uint64_t length) {
  if (state_ == State::kStart) return NoHeader(PartKind::kChunk);
  if (state_ == State::kFinished) return OrderError("a chunk came after the trailer");
  if (state_ == State::kHeader) {
    return OrderError(absl::StrCat("a chunk came before the table was complete (", tensors_.size(),
                                   " of ", options_.tensor_count, " tensors)"),
                      {{"tensor_count", Text(options_.tensor_count)}});
  }
  if (length > options_.max_chunk_bytes) {
    return MakeError(Reason::kChunkInvalid,
                     absl::StrCat("the chunk at offset ", offset, " has ", length,
                                  " bytes; at most ", options_.max_chunk_bytes,
                                  " are taken (Limits.max_chunk_bytes): send smaller chunks"),
                     {{"max_chunk_bytes", absl::StrCat(options_.max_chunk_bytes)}});
  }
  state_ = State::kChunks;
  if (length == 0) return absl::OkStatus();
  if (range_ == options_.ranges.size()) {
    return OrderError(
        absl::StrCat("a chunk at offset ", offset, " came after all ", expected_bytes_, " bytes"),
        {{"offset", Text(offset)}, {"total_bytes", Text(expected_bytes_)}});
  }
  const std::string where = name(by_offset_[position_]);
  if (offset != next_offset_) {
    return OrderError(
        absl::StrCat("a chunk has offset ", offset, ", where ", next_offset_,
                     " is due (in tensor \"", where,
                     "\"): chunks come in ascending order without gap or overlap"),
        {{"tensor", where}, {"offset", Text(offset)}, {"expected_offset", Text(next_offset_)}});
  }
  const uint64_t end = options_.ranges[range_].end;
  if (length > end - offset) {
    return OrderError(absl::StrCat("a chunk of ", length, " bytes at offset ", offset,
                                   " (in tensor \"", where, "\") ends beyond ", end),
                      {{"tensor", where}, {"offset", Text(offset)}, {"end", Text(end)}});
  }
  return absl::OkStatus();
}

absl::Span<uint8_t> TensorReceiver::Destination(uint64_t offset, uint64_t max) {
  const uint32_t index = by_offset_[position_];
  const ReceivedTensor& tensor = tensors_[index];
  const uint64_t within = offset - tensor.offset;
  const uint64_t size = std::min(max, tensor.spec.nbytes() - within);
  const absl::Span<uint8_t> to = destination_->Destination(index, within, size);
  return to.subspan(0, std::min<uint64_t>(to.size(), size));
}

absl::Status TensorReceiver::OnCopied(uint64_t offset, absl::Span<const uint8_t> bytes) {
  const uint32_t index = by_offset_[position_];
  const ReceivedTensor& tensor = tensors_[index];
  const uint64_t end = tensor.offset + tensor.spec.nbytes();
  next_offset_ += bytes.size();
  received_bytes_ += bytes.size();
  destination_->OnBytes(index, offset - tensor.offset, bytes);
  if (!options_.digests) {
    position_ += next_offset_ == end;
    return absl::OkStatus();
  }
  const bool whole = offset == tensor.offset && next_offset_ == end;
  if (!whole) {
    if (offset == tensor.offset) {
      hash_.Reset();
      hashing_ = true;
    }
    if (hashing_) hash_.Update(bytes);
  }
  if (next_offset_ < end) return absl::OkStatus();
  ++position_;
  if (whole) return FinishTensor(index, Xxh3(bytes));
  const bool complete = std::exchange(hashing_, false);
  return complete ? FinishTensor(index, hash_.Digest()) : absl::OkStatus();
}

absl::Status TensorReceiver::FinishTensor(size_t index, uint64_t digest) {
  digests_[index] = digest;
  has_digest_[index] = true;
  const std::optional<uint64_t>& stated = tensors_[index].stated_xxh3;
  if (!stated) return absl::OkStatus();
  if (*stated != digest) {
    return MakeError(Reason::kDigestMismatch,
                     absl::StrCat("tensor \"", name(index), "\": the bytes that arrived have XXH3 ",
                                  DigestToHex(digest), ", the table says ", DigestToHex(*stated)),
                     {{"tensor", name(index)}});
  }
  MarkVerified(index);
  return absl::OkStatus();
}

void TensorReceiver::MarkVerified(size_t index) {
  if (!verified_[index]) ++verified_digests_;
  verified_[index] = true;
}

absl::Status TensorReceiver::AddTrailer(const v1::Trailer& trailer) {
  if (state_ == State::kStart) return NoHeader(PartKind::kTrailer);
  if (state_ == State::kFinished) return OrderError("a second trailer came; a stream has one");
  if (state_ == State::kHeader && tensors_.size() == options_.tensor_count) {
    MS_RETURN_IF_ERROR(CompleteTable());  // an empty table
  }
  if (state_ == State::kHeader) {
    return OrderError(absl::StrCat("the trailer came before the table was complete (",
                                   tensors_.size(), " of ", options_.tensor_count, " tensors)"),
                      {{"tensor_count", Text(options_.tensor_count)}});
  }
  if (received_bytes_ != expected_bytes_) {
    return MakeError(
        Reason::kChunkInvalid,
        absl::StrCat("the trailer came after ", received_bytes_, " of ", expected_bytes_,
                     " bytes; the next is offset ", next_offset_, ", in tensor \"",
                     name(by_offset_[position_]), "\""),
        {{"tensor", name(by_offset_[position_])}, {"offset", absl::StrCat(next_offset_)}});
  }
  if (trailer.total_bytes() != 0 && trailer.total_bytes() != received_bytes_) {
    return OrderError(
        absl::StrCat("the trailer says ", trailer.total_bytes(), " bytes, ", received_bytes_,
                     " came in chunks"),
        {{"total_bytes", Text(trailer.total_bytes())}, {"received_bytes", Text(received_bytes_)}});
  }
  for (const v1::TensorDigest& entry : trailer.digests()) {
    if (entry.index() >= tensors_.size()) {
      return OrderError(absl::StrCat("the trailer has a digest of tensor ", entry.index(),
                                     ", the table has ", tensors_.size()),
                        {{"index", Text(entry.index())}});
    }
    const std::optional<uint64_t> stated = DigestFromHex(entry.xxh3());
    if (!stated) {
      return OrderError(absl::StrCat("the trailer's digest of tensor \"", name(entry.index()),
                                     "\" is not 16 lower-case hex digits"),
                        {{"tensor", name(entry.index())}});
    }
    const std::optional<uint64_t> actual = digest(entry.index());
    if (!actual) {
      return OrderError(absl::StrCat("the trailer has a digest of tensor \"", name(entry.index()),
                                     "\", which was not whole in this stream"),
                        {{"tensor", name(entry.index())}});
    }
    if (*stated != *actual) {
      return MakeError(
          Reason::kDigestMismatch,
          absl::StrCat("tensor \"", name(entry.index()), "\": the bytes that arrived have XXH3 ",
                       DigestToHex(*actual), ", the sender's were ", DigestToHex(*stated),
                       "; send it again"),
          {{"tensor", name(entry.index())}});
    }
    MarkVerified(entry.index());
  }
  state_ = State::kFinished;
  return absl::OkStatus();
}

absl::Status TensorReceiver::CheckFinished() const {
  switch (state_) {
    case State::kStart:
      return OrderError("the stream ended without a header");
    case State::kHeader:
      return OrderError(
          absl::StrCat("the stream ended before the table was complete (", tensors_.size(), " of ",
                       options_.tensor_count, " tensors); nothing of it was used"),
          {{"tensor_count", Text(options_.tensor_count)}});
    case State::kTable:
    case State::kChunks:
      return OrderError(
          absl::StrCat("the stream ended without its trailer, after ", received_bytes_, " of ",
                       expected_bytes_, " bytes; nothing of it was used"),
          {{"received_bytes", Text(received_bytes_)}, {"total_bytes", Text(expected_bytes_)}});
    case State::kFinished:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

std::optional<uint64_t> TensorReceiver::digest(size_t index) const {
  if (index >= digests_.size()) return std::nullopt;
  const auto owner = owner_of_.find(static_cast<uint32_t>(index));
  const size_t holder = owner == owner_of_.end() ? index : owner->second;
  if (!has_digest_[holder]) return std::nullopt;
  return digests_[holder];
}

}  // namespace modelstate
