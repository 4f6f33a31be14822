#include "common/wire/part_codec.h"

#include <gmock/gmock.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "modelstate/v1/state.pb.h"
#include "modelstate/v1/step.pb.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;

// A region that takes any chunk inside it, in pieces of at most `piece` bytes.
class Region final : public ChunkSink {
 public:
  explicit Region(size_t size, size_t piece = SIZE_MAX) : bytes_(size), piece_(piece) {}

  absl::Status OnChunk(uint64_t offset, uint64_t length) override {
    ++chunks_;
    if (offset + length > bytes_.size()) return MakeError(Reason::kChunkInvalid, "outside");
    return absl::OkStatus();
  }
  absl::Span<uint8_t> Destination(uint64_t offset, uint64_t max) override {
    return absl::MakeSpan(bytes_).subspan(offset, std::min<uint64_t>(max, piece_));
  }
  absl::Status OnCopied(uint64_t offset, absl::Span<const uint8_t> bytes) override {
    EXPECT_EQ(std::memcmp(bytes.data(), bytes_.data() + offset, bytes.size()), 0);
    copied_ += bytes.size();
    return absl::OkStatus();
  }

  std::string text() const { return std::string(bytes_.begin(), bytes_.end()); }
  int chunks_ = 0;
  uint64_t copied_ = 0;

 private:
  std::vector<uint8_t> bytes_;
  size_t piece_;
};

std::string RandomText(std::mt19937_64& random, size_t size) {
  std::string text(size, '\0');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

absl::Span<const uint8_t> Bytes(const std::string& text) {
  return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

std::string Flatten(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& slice : slices) {
    text.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return text;
}

// `text` cut into slices at random places.
grpc::ByteBuffer CutRandomly(const std::string& text, std::mt19937_64& random) {
  std::vector<grpc::Slice> slices;
  size_t pos = 0;
  while (pos < text.size()) {
    const size_t size = std::min<size_t>(1 + random() % 40, text.size() - pos);
    slices.emplace_back(text.data() + pos, size);
    pos += size;
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

struct Decoded {
  absl::StatusOr<PartKind> kind;
  v1::Header header;
  v1::TensorTable table;
  v1::Trailer trailer;
};

Decoded Decode(grpc::ByteBuffer buffer, ChunkSink* sink) {
  Decoded decoded{absl::UnknownError(""), {}, {}, {}};
  decoded.kind = DecodePart(&buffer, &decoded.header, &decoded.table, &decoded.trailer, sink);
  return decoded;
}

Decoded DecodeText(const std::string& text, ChunkSink* sink) {
  grpc::Slice slice(text);
  return Decode(grpc::ByteBuffer(&slice, 1), sink);
}

void CountRelease(void* counter) { ++*static_cast<std::atomic<int>*>(counter); }

TEST(PartCodec, EncodedChunkIsAPlainProtobufMessage) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    std::atomic<int> released = 0;
    int borrowed = 0;
    std::string payload;
    std::vector<std::string> pieces;
    for (uint64_t i = 0; i < 1 + random() % 20; ++i) {
      pieces.push_back(
          RandomText(random, random() % 3 == 0 ? 4096 + random() % 9000 : random() % 90));
    }
    const uint64_t offset = random() % 2 == 0 ? 0 : random();
    {
      ChunkEncoder encoder;
      encoder.Begin(offset);
      for (const std::string& piece : pieces) {
        payload += piece;
        if (random() % 2 == 0) {
          ++borrowed;
          encoder.AddBorrowed(Bytes(piece), &CountRelease, &released);
        } else {
          encoder.AddCopied(Bytes(piece));
        }
      }
      EXPECT_EQ(encoder.size(), payload.size());
      grpc::ByteBuffer message = encoder.Finish();
      v1::StepPart part;
      ASSERT_TRUE(part.ParseFromString(Flatten(message)));
      ASSERT_TRUE(part.has_chunk());
      EXPECT_EQ(part.chunk().offset(), offset);
      EXPECT_EQ(part.chunk().data(), payload);
    }
    EXPECT_EQ(released, borrowed) << "each borrowed piece is given back exactly once";
  }
}

TEST(PartCodec, LargePiecesAreNotCopied) {
  const std::string payload(8192, 'x');
  std::atomic<int> released = 0;
  ChunkEncoder encoder;
  encoder.Begin(7);
  encoder.AddBorrowed(Bytes(payload), &CountRelease, &released);
  grpc::ByteBuffer message = encoder.Finish();
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(message.Dump(&slices).ok());
  ASSERT_EQ(slices.size(), 2u);
  EXPECT_EQ(slices[1].begin(), reinterpret_cast<const uint8_t*>(payload.data()));
  EXPECT_EQ(released, 0);
  slices.clear();
  message.Clear();
  EXPECT_EQ(released, 1);
}

TEST(PartCodec, UnfinishedChunkIsReleased) {
  const std::string payload(8192, 'x');
  std::atomic<int> released = 0;
  ChunkEncoder encoder;
  encoder.Begin(0);
  encoder.AddBorrowed(Bytes(payload), &CountRelease, &released);
  encoder.Begin(0);
  EXPECT_EQ(released, 1);
  EXPECT_EQ(encoder.size(), 0u);
}

TEST(PartCodec, DecodesWhatProtobufEncodesHoweverItIsCut) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    const uint64_t offset = random() % 3 == 0 ? 0 : random() % 1000;
    const std::string payload = RandomText(random, random() % 2000);
    v1::StatePart part;
    part.mutable_chunk()->set_offset(offset);
    part.mutable_chunk()->set_data(payload);
    Region region(4000, 1 + random() % 300);
    const Decoded decoded = Decode(CutRandomly(part.SerializeAsString(), random), &region);
    ASSERT_TRUE(decoded.kind.ok()) << decoded.kind.status();
    EXPECT_EQ(*decoded.kind, PartKind::kChunk);
    EXPECT_EQ(region.chunks_, 1);
    EXPECT_EQ(region.copied_, payload.size());
    EXPECT_EQ(region.text().substr(offset, payload.size()), payload);
  }
}

TEST(PartCodec, DecodesHeaderTableAndTrailer) {
  Region region(0);
  v1::StatePart part;
  part.mutable_header()->set_module("m");
  EXPECT_EQ(DecodeText(part.SerializeAsString(), &region).header.module(), "m");
  part.mutable_tensors()->add_tensors()->set_name("w");
  Decoded decoded = DecodeText(part.SerializeAsString(), &region);
  ASSERT_TRUE(decoded.kind.ok());
  EXPECT_EQ(*decoded.kind, PartKind::kTable);
  EXPECT_EQ(decoded.table.tensors(0).name(), "w");
  part.mutable_trailer()->set_total_bytes(9);
  decoded = DecodeText(part.SerializeAsString(), &region);
  ASSERT_TRUE(decoded.kind.ok());
  EXPECT_EQ(*decoded.kind, PartKind::kTrailer);
  EXPECT_EQ(decoded.trailer.total_bytes(), 9u);
}

TEST(PartCodec, DataBeforeItsOffsetGoesToTheOffset) {
  // chunk { data (15): "abc", offset (1): 5 }
  const std::string chunk = std::string("\x7A\x03", 2) + "abc" + std::string("\x08\x05", 2);
  Region region(8);
  const Decoded decoded =
      DecodeText(std::string("\x1A", 1) + static_cast<char>(chunk.size()) + chunk, &region);
  ASSERT_TRUE(decoded.kind.ok()) << decoded.kind.status();
  EXPECT_EQ(region.text().substr(5), "abc");
}

TEST(PartCodec, SkipsUnknownFieldsAndGroups) {
  v1::StatePart part;
  part.mutable_chunk()->set_offset(1);
  part.mutable_chunk()->set_data("z");
  // Field 100 as a varint, 101 as a group with a varint in it, 102 as fixed64.
  const std::string unknown(
      "\xA0\x06\x01\xAB\x06\x08\x01\xAC\x06\xB1\x06"
      "12345678",
      19);
  Region region(2);
  const Decoded decoded = DecodeText(unknown + part.SerializeAsString() + unknown, &region);
  ASSERT_TRUE(decoded.kind.ok()) << decoded.kind.status();
  EXPECT_EQ(region.text()[1], 'z');
}

TEST(PartCodec, RefusesNoPartAndTwoParts) {
  Region region(8);
  Decoded decoded = DecodeText("", &region);
  EXPECT_EQ(GetReason(decoded.kind.status()), Reason::kChunkInvalid) << decoded.kind.status();
  v1::StatePart part;
  part.mutable_chunk()->set_data("z");
  decoded = DecodeText(part.SerializeAsString() + part.SerializeAsString(), &region);
  EXPECT_EQ(GetReason(decoded.kind.status()), Reason::kChunkInvalid) << decoded.kind.status();
  EXPECT_THAT(std::string(decoded.kind.status().message()), HasSubstr("more than one part"));
}

TEST(PartCodec, SinkRefusesBeforeAnyByteIsTaken) {
  v1::StatePart part;
  part.mutable_chunk()->set_offset(6);
  part.mutable_chunk()->set_data("abc");
  Region region(8);
  const Decoded decoded = DecodeText(part.SerializeAsString(), &region);
  EXPECT_FALSE(decoded.kind.ok());
  EXPECT_EQ(region.copied_, 0u);
}

TEST(PartCodec, EveryTruncationAndRandomBytesEndInAStatus) {
  v1::StatePart part;
  part.mutable_chunk()->set_offset(3);
  part.mutable_chunk()->set_data(std::string(300, 'q'));
  const std::string whole = part.SerializeAsString();
  for (size_t size = 1; size < whole.size(); ++size) {
    Region region(400);
    const Decoded decoded = DecodeText(whole.substr(0, size), &region);
    EXPECT_EQ(GetReason(decoded.kind.status()), Reason::kChunkInvalid) << size;
  }
  std::mt19937_64 random(7);
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = i % 2 == 0 ? RandomText(random, 1 + random() % 60) : whole;
    if (i % 2 == 1) bytes[random() % 12] = static_cast<char>(random());
    Region region(400);
    (void)Decode(CutRandomly(bytes, random), &region);
  }
}

}  // namespace
}  // namespace modelstate
