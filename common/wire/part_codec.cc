#include "common/wire/part_codec.h"

#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/proto_buffer_writer.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/copy_payload.h"

namespace modelstate {
namespace {

using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;

enum WireType : uint32_t {
  kVarint = 0,
  kFixed64 = 1,
  kLengthDelimited = 2,
  kStartGroup = 3,
  kEndGroup = 4,
  kFixed32 = 5,
};

constexpr uint32_t Tag(uint32_t field, WireType type) { return field << 3 | type; }

constexpr uint32_t kHeaderTag = Tag(1, kLengthDelimited);
constexpr uint32_t kTableTag = Tag(2, kLengthDelimited);
constexpr uint32_t kChunkTag = Tag(3, kLengthDelimited);
constexpr uint32_t kTrailerTag = Tag(4, kLengthDelimited);
constexpr uint32_t kChunkOffsetTag = Tag(v1::Chunk::kOffsetFieldNumber, kVarint);
constexpr uint32_t kChunkDataTag = Tag(v1::Chunk::kDataFieldNumber, kLengthDelimited);

absl::Status Malformed(absl::string_view where) {
  return MakeError(
      Reason::kChunkInvalid,
      absl::StrCat("a message of the stream is not a valid protobuf message: ", where));
}

void FreeString(void* text) { delete static_cast<std::string*>(text); }

bool SkipField(CodedInputStream* in, uint32_t tag, int depth = 0) {
  constexpr int kMaxDepth = 32;
  if (tag >> 3 == 0) return false;
  switch (tag & 7) {
    case kVarint: {
      uint64_t value = 0;
      return in->ReadVarint64(&value);
    }
    case kFixed64:
      return in->Skip(8);
    case kFixed32:
      return in->Skip(4);
    case kLengthDelimited: {
      uint32_t length = 0;
      return in->ReadVarint32(&length) && length <= INT32_MAX && in->Skip(static_cast<int>(length));
    }
    case kStartGroup:
      if (depth == kMaxDepth) return false;
      while (true) {
        const uint32_t inner = in->ReadTag();
        if (inner == 0) return false;
        if ((inner & 7) == kEndGroup) return inner >> 3 == tag >> 3;
        if (!SkipField(in, inner, depth + 1)) return false;
      }
    default:
      return false;
  }
}

// Reads the length of a field that must lie inside the current limit.
bool ReadLength(CodedInputStream* in, int* length) {
  uint32_t value = 0;
  if (!in->ReadVarint32(&value) || value > INT32_MAX) return false;
  const int left = in->BytesUntilLimit();
  if (left >= 0 && value > static_cast<uint32_t>(left)) return false;
  *length = static_cast<int>(value);
  return true;
}

absl::Status CopyTo(ChunkSink* sink, uint64_t offset, const uint8_t* data, size_t size) {
  while (size > 0) {
    const absl::Span<uint8_t> to = sink->Destination(offset, size);
    if (to.empty() || to.size() > size) return absl::InternalError("a chunk sink gave no room");
    CopyPayload(to.data(), data, to.size());
    MS_RETURN_IF_ERROR(sink->OnCopied(offset, absl::MakeConstSpan(data, to.size())));
    offset += to.size();
    data += to.size();
    size -= to.size();
  }
  return absl::OkStatus();
}

absl::Status CopyFromStream(CodedInputStream* in, uint64_t offset, int length, ChunkSink* sink) {
  while (length > 0) {
    const void* data = nullptr;
    int available = 0;
    if (!in->GetDirectBufferPointer(&data, &available)) return Malformed("a chunk is cut short");
    available = std::min(available, length);
    MS_RETURN_IF_ERROR(
        CopyTo(sink, offset, static_cast<const uint8_t*>(data), static_cast<size_t>(available)));
    in->Skip(available);
    offset += static_cast<uint64_t>(available);
    length -= available;
  }
  return absl::OkStatus();
}

absl::Status DecodeChunk(CodedInputStream* in, ChunkSink* sink) {
  std::optional<uint64_t> offset;
  bool has_data = false;
  std::string early;  // data that came before its offset
  bool is_early = false;
  while (in->BytesUntilLimit() > 0) {
    const uint32_t tag = in->ReadTag();
    if (tag == kChunkOffsetTag) {
      uint64_t value = 0;
      if (!in->ReadVarint64(&value)) return Malformed("the offset of a chunk");
      if (offset) return Malformed("a chunk has two offsets");
      offset = value;
    } else if (tag == kChunkDataTag) {
      int length = 0;
      if (!ReadLength(in, &length)) return Malformed("the length of a chunk");
      if (has_data) return Malformed("a chunk has its data twice");
      has_data = true;
      if (offset) {
        MS_RETURN_IF_ERROR(sink->OnChunk(*offset, static_cast<uint64_t>(length)));
        MS_RETURN_IF_ERROR(CopyFromStream(in, *offset, length, sink));
      } else {
        // proto3 leaves out an offset of 0, and fields may come in any order.
        is_early = true;
        if (!in->ReadString(&early, length)) return Malformed("a chunk is cut short");
      }
    } else if (!SkipField(in, tag)) {
      return Malformed("a field of a chunk");
    }
  }
  if (in->BytesUntilLimit() != 0) return Malformed("a chunk is longer than it says");
  if (!has_data) return sink->OnChunk(offset.value_or(0), 0);
  if (!is_early) return absl::OkStatus();
  MS_RETURN_IF_ERROR(sink->OnChunk(offset.value_or(0), early.size()));
  return CopyTo(sink, offset.value_or(0), reinterpret_cast<const uint8_t*>(early.data()),
                early.size());
}

}  // namespace

void ChunkEncoder::Begin(uint64_t offset) {
  offset_ = offset;
  size_ = 0;
  copied_.clear();
  slices_.clear();
  slices_.emplace_back();  // becomes the head
}

void ChunkEncoder::AddBorrowed(absl::Span<const uint8_t> bytes, Release release, void* user_data) {
  if (bytes.size() < kCopyBelow) {
    AddCopied(bytes);
    release(user_data);
    return;
  }
  FlushCopied();
  // gRPC's slices are not const, but nothing writes to one that it sends.
  slices_.emplace_back(const_cast<uint8_t*>(bytes.data()), bytes.size(), release, user_data);
  size_ += bytes.size();
}

void ChunkEncoder::AddCopied(absl::Span<const uint8_t> bytes) {
  copied_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  size_ += bytes.size();
}

void ChunkEncoder::FlushCopied() {
  if (copied_.empty()) return;
  auto* text = new std::string(std::move(copied_));
  copied_.clear();
  slices_.emplace_back(text->data(), text->size(), &FreeString, text);
}

grpc::ByteBuffer ChunkEncoder::Finish() {
  FlushCopied();
  const uint64_t data_head = 1 + CodedOutputStream::VarintSize64(size_);
  const uint64_t offset_field = 1 + CodedOutputStream::VarintSize64(offset_);
  uint8_t head[64];
  uint8_t* end = head;
  end = CodedOutputStream::WriteTagToArray(kChunkTag, end);
  end = CodedOutputStream::WriteVarint64ToArray(offset_field + data_head + size_, end);
  // Also when it is 0, so that the receiver knows it before the data.
  end = CodedOutputStream::WriteTagToArray(kChunkOffsetTag, end);
  end = CodedOutputStream::WriteVarint64ToArray(offset_, end);
  end = CodedOutputStream::WriteTagToArray(kChunkDataTag, end);
  end = CodedOutputStream::WriteVarint64ToArray(size_, end);
  slices_[0] = grpc::Slice(head, static_cast<size_t>(end - head));
  grpc::ByteBuffer message(slices_.data(), slices_.size());
  slices_.clear();
  return message;
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::MessageLite& message) {
  const size_t size = message.ByteSizeLong();
  grpc::Slice slice(size);
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

absl::StatusOr<PartKind> DecodePart(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* header,
                                    v1::TensorTable* table, v1::Trailer* trailer, ChunkSink* sink) {
  grpc::ProtoBufferReader reader(bytes);
  if (!reader.status().ok()) return Malformed("its bytes cannot be read");
  CodedInputStream in(&reader);
  const uint64_t size = bytes->Length();
  if (size > INT32_MAX) return Malformed("it is larger than 2 GiB");
  const auto whole = in.PushLimit(static_cast<int>(size));
  std::optional<PartKind> kind;
  while (in.BytesUntilLimit() > 0) {
    const uint32_t tag = in.ReadTag();
    if (tag != kHeaderTag && tag != kTableTag && tag != kChunkTag && tag != kTrailerTag) {
      if (!SkipField(&in, tag)) return Malformed("an unknown field");
      continue;
    }
    if (kind) return Malformed("it has more than one part");
    int length = 0;
    if (!ReadLength(&in, &length)) return Malformed("the length of its part");
    const auto limit = in.PushLimit(length);
    if (tag == kChunkTag) {
      kind = PartKind::kChunk;
      MS_RETURN_IF_ERROR(DecodeChunk(&in, sink));
    } else {
      google::protobuf::MessageLite* part = header;
      if (tag == kTableTag) part = table;
      if (tag == kTrailerTag) part = trailer;
      kind = tag == kHeaderTag  ? PartKind::kHeader
             : tag == kTableTag ? PartKind::kTable
                                : PartKind::kTrailer;
      if (!part->MergeFromCodedStream(&in) || in.BytesUntilLimit() != 0) {
        return Malformed(tag == kHeaderTag  ? "its header"
                         : tag == kTableTag ? "its part of the tensor table"
                                            : "its trailer");
      }
    }
    in.PopLimit(limit);
  }
  in.PopLimit(whole);
  if (!kind) return Malformed("it has none of header, tensors, chunk and trailer");
  return *kind;
}

}  // namespace modelstate
