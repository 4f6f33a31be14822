#include "common/wire/tensor_receiver.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/table_splitter.h"
#include "modelstate/v1/state.pb.h"
#include "modelstate/v1/step.pb.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;

class Memory final : public TensorDestination {
 public:
  absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) override {
    ++tables;
    for (const ReceivedTensor& tensor : tensors) {
      bytes.emplace_back(tensor.owns_bytes ? tensor.spec.nbytes() : 0);
    }
    return table_status;
  }
  absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) override {
    return absl::MakeSpan(bytes[index]).subspan(offset, max);
  }
  absl::Status OnChunkDone(uint64_t offset, uint64_t length) override {
    EXPECT_EQ(offset, done);
    done = offset + length;
    return absl::OkStatus();
  }

  int tables = 0;
  uint64_t done = 0;
  absl::Status table_status;
  std::vector<std::vector<uint8_t>> bytes;
};

v1::TensorInfo U8(const std::string& name, int64_t size, uint64_t offset) {
  v1::TensorInfo info;
  info.set_name(name);
  info.set_dtype(v1::U8);
  info.add_shape(size);
  info.set_offset(offset);
  return info;
}

// A push of a: "abc" at 0 and b: "defgh" at 3, as a script of messages.
class TensorReceiverTest : public ::testing::Test {
 protected:
  absl::Status Header(uint64_t count = 2, uint64_t total = 8) {
    v1::StepPart part;
    part.mutable_header()->set_module("m");
    MS_RETURN_IF_ERROR(Send(part));
    options_.tensor_count = count;
    options_.total_bytes = total;
    return receiver_.Begin(options_);
  }
  absl::Status Table(std::vector<v1::TensorInfo> infos) {
    v1::StepPart part;
    part.mutable_tensors();
    for (v1::TensorInfo& info : infos) *part.mutable_tensors()->add_tensors() = std::move(info);
    return Send(part);
  }
  absl::Status Table() { return Table({U8("a", 3, 0), U8("b", 5, 3)}); }
  absl::Status Chunk(uint64_t offset, const std::string& data) {
    v1::StepPart part;
    part.mutable_chunk()->set_offset(offset);
    part.mutable_chunk()->set_data(data);
    return Send(part);
  }
  absl::Status Trailer(std::vector<std::pair<uint32_t, std::string>> digests = {},
                       uint64_t total = 0) {
    v1::StepPart part;
    part.mutable_trailer()->set_total_bytes(total);
    for (const auto& [index, xxh3] : digests) {
      v1::TensorDigest* digest = part.mutable_trailer()->add_digests();
      digest->set_index(index);
      digest->set_xxh3(xxh3);
    }
    return Send(part);
  }
  absl::Status Send(const v1::StepPart& part) {
    grpc::ByteBuffer message = SerializeMessage(part);
    v1::StepHeader header;
    return receiver_.Receive(&message, &header).status();
  }

  static void ExpectChunkInvalid(const absl::Status& status, const std::string& text) {
    EXPECT_EQ(GetReason(status), Reason::kChunkInvalid) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }

  Memory memory_;
  TensorReceiver::Options options_;
  TensorReceiver receiver_{&memory_};
};

TEST_F(TensorReceiverTest, ChunkAboveTheLimitIsRefusedWithIt) {
  options_.max_chunk_bytes = 4;
  ASSERT_TRUE(Header().ok());
  ASSERT_TRUE(Table().ok());
  ASSERT_TRUE(Chunk(0, "abcd").ok());
  ExpectChunkInvalid(Chunk(4, "efghi"), "at most 4");
}

TEST_F(TensorReceiverTest, TakesAWholePushAndItsDigests) {
  ASSERT_TRUE(Header().ok());
  ASSERT_TRUE(Table().ok());
  ASSERT_TRUE(Chunk(0, "abcd").ok());
  ASSERT_TRUE(Chunk(4, "efgh").ok());
  const std::string digest_a = DigestToHex(Xxh3(AsBytes("abc")));
  const std::string digest_b = DigestToHex(Xxh3(AsBytes("defgh")));
  ASSERT_TRUE(Trailer({{1, digest_b}, {0, digest_a}}, 8).ok());
  EXPECT_TRUE(receiver_.CheckFinished().ok());
  EXPECT_EQ(receiver_.verified_digests(), 2u);
  EXPECT_EQ(std::string(memory_.bytes[1].begin(), memory_.bytes[1].end()), "defgh");
  EXPECT_EQ(receiver_.digest(1), Xxh3(AsBytes("defgh")));
  EXPECT_EQ(memory_.tables, 1);
}

TEST_F(TensorReceiverTest, TakesPlacesInAnyOrderOfTheTable) {
  ASSERT_TRUE(Header().ok());
  ASSERT_TRUE(Table({U8("a", 3, 5)}).ok());
  EXPECT_EQ(memory_.tables, 0);
  ASSERT_TRUE(Table({U8("b", 5, 0)}).ok());
  ASSERT_TRUE(Chunk(0, "defghabc").ok());
  ASSERT_TRUE(Trailer().ok());
  EXPECT_EQ(std::string(memory_.bytes[0].begin(), memory_.bytes[0].end()), "abc");
}

TEST_F(TensorReceiverTest, RefusesAnEmptyTensorOutsideTheRegion) {
  ASSERT_TRUE(Header(2, 3).ok());
  ExpectChunkInvalid(Table({U8("a", 3, 0), U8("none", 0, 1000)}), "\"none\" has offset 1000");
}

TEST_F(TensorReceiverTest, InlineValuesNeedNoChunks) {
  ASSERT_TRUE(Header(4, 3).ok());
  v1::TensorInfo typed = U8("typed", 2, 0);
  typed.mutable_values()->mutable_ints()->add_values(7);
  typed.mutable_values()->mutable_ints()->add_values(8);
  v1::TensorInfo tied = U8("tied", 3, 0);
  tied.set_alias_of("a");
  ASSERT_TRUE(Table({typed, U8("a", 3, 0), U8("none", 0, 0), tied}).ok());
  ASSERT_TRUE(Chunk(0, "abc").ok());
  ASSERT_TRUE(Trailer().ok());
  EXPECT_EQ(receiver_.tensors()[0].values, "\x07\x08");
  EXPECT_FALSE(receiver_.tensors()[3].owns_bytes);
  EXPECT_EQ(receiver_.digest(3), Xxh3(AsBytes("abc")));
  EXPECT_EQ(receiver_.digest(2), Xxh3({}));
}

TEST_F(TensorReceiverTest, NothingComesBeforeTheHeader) {
  ExpectChunkInvalid(Table(), "before the header");
  ExpectChunkInvalid(Chunk(0, "a"), "before the header");
  ExpectChunkInvalid(Trailer(), "before the header");
  ExpectChunkInvalid(receiver_.CheckFinished(), "without a header");
}

TEST_F(TensorReceiverTest, RefusesASecondHeader) {
  ASSERT_TRUE(Header().ok());
  ExpectChunkInvalid(Header(), "second header");
}

TEST_F(TensorReceiverTest, RefusesAChunkBeforeTheTableIsComplete) {
  ASSERT_TRUE(Header(5, 8).ok());
  ASSERT_TRUE(Table({U8("a", 3, 0), U8("b", 4, 3), U8("c", 1, 7)}).ok());
  ExpectChunkInvalid(Chunk(0, "abc"),
                     "a chunk came before the table was complete (3 of 5 tensors)");
  ExpectChunkInvalid(Trailer(), "the trailer came before the table was complete (3 of 5 tensors)");
  ExpectChunkInvalid(receiver_.CheckFinished(), "3 of 5");
}

TEST_F(TensorReceiverTest, RefusesMoreTensorsThanTheHeaderSays) {
  ASSERT_TRUE(Header(1, 3).ok());
  ExpectChunkInvalid(Table(), "\"b\"");
}

TEST_F(TensorReceiverTest, RefusesATableAfterTheTable) {
  ASSERT_TRUE(Header().ok());
  ASSERT_TRUE(Table().ok());
  ExpectChunkInvalid(Table({U8("c", 1, 8)}), "after the table was complete");
}

TEST_F(TensorReceiverTest, RefusesNamesThatComeTwice) {
  ASSERT_TRUE(Header().ok());
  const absl::Status status = Table({U8("a", 3, 0), U8("a", 5, 3)});
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"a\" comes twice"));
}

TEST_F(TensorReceiverTest, RefusesPlacesWithGapOverlapOrWrongTotal) {
  const std::vector<std::vector<v1::TensorInfo>> tables = {
      {U8("a", 3, 0), U8("b", 5, 4)}, {U8("a", 3, 0), U8("b", 5, 2)},
      {U8("a", 3, 1), U8("b", 5, 4)}, {U8("a", 3, 0), U8("b", 6, 3)},
      {U8("a", 3, 0), U8("b", 4, 3)}, {U8("a", 3, 0), U8("b", int64_t{1} << 58, 3)},
  };
  for (const auto& table : tables) {
    Memory memory;
    TensorReceiver receiver(&memory);
    TensorReceiver::Options options;
    options.tensor_count = 2;
    options.total_bytes = 8;
    ASSERT_TRUE(receiver.Begin(options).ok());
    v1::TensorTable part;
    for (const v1::TensorInfo& info : table) *part.add_tensors() = info;
    EXPECT_EQ(GetReason(receiver.AddTable(part)), Reason::kChunkInvalid);
    EXPECT_EQ(memory.tables, 0) << "refused before the destination hears of it";
  }
}

TEST_F(TensorReceiverTest, RefusesGapsOverlapsAndOverruns) {
  ASSERT_TRUE(Header().ok());
  ASSERT_TRUE(Table().ok());
  ExpectChunkInvalid(Chunk(1, "bc"), "where 0 is due (in tensor \"a\")");
  ASSERT_TRUE(Chunk(0, "abcd").ok());
  ExpectChunkInvalid(Chunk(3, "d"), "where 4 is due (in tensor \"b\")");
  ExpectChunkInvalid(Chunk(4, "efghi"), "ends beyond 8");
  ExpectChunkInvalid(Trailer(), "after 4 of 8 bytes; the next is offset 4, in tensor \"b\"");
  ASSERT_TRUE(Chunk(4, "efgh").ok());
  ExpectChunkInvalid(Chunk(8, "i"), "after all 8 bytes");
  ExpectChunkInvalid(receiver_.CheckFinished(), "without its trailer");
  ASSERT_TRUE(Trailer().ok());
  ExpectChunkInvalid(Trailer(), "second trailer");
  ExpectChunkInvalid(Chunk(8, ""), "after the trailer");
}

// What a program decides by is not only in the text.
TEST_F(TensorReceiverTest, RefusalsHaveTheirValuesInTheMetadata) {
  using testing::Pair;
  using testing::UnorderedElementsAre;
  ASSERT_TRUE(Header().ok());
  EXPECT_THAT(GetErrorMetadata(Chunk(0, "a")), UnorderedElementsAre(Pair("tensor_count", "2")));
  ASSERT_TRUE(Table().ok());
  EXPECT_THAT(
      GetErrorMetadata(Chunk(1, "bc")),
      UnorderedElementsAre(Pair("tensor", "a"), Pair("offset", "1"), Pair("expected_offset", "0")));
  EXPECT_THAT(GetErrorMetadata(Chunk(0, "abcdefghi")),
              UnorderedElementsAre(Pair("tensor", "a"), Pair("offset", "0"), Pair("end", "8")));
  ASSERT_TRUE(Chunk(0, "abcd").ok());
  EXPECT_THAT(GetErrorMetadata(receiver_.CheckFinished()),
              UnorderedElementsAre(Pair("received_bytes", "4"), Pair("total_bytes", "8")));
  ASSERT_TRUE(Chunk(4, "efgh").ok());
  EXPECT_THAT(GetErrorMetadata(Trailer({}, 7)),
              UnorderedElementsAre(Pair("total_bytes", "7"), Pair("received_bytes", "8")));
  EXPECT_THAT(GetErrorMetadata(Trailer({{1, "xyz"}})), UnorderedElementsAre(Pair("tensor", "b")));
}

TEST_F(TensorReceiverTest, RefusesWrongDigestsAndTotals) {
  ASSERT_TRUE(Header().ok());
  ASSERT_TRUE(Table().ok());
  ASSERT_TRUE(Chunk(0, "abcdefgh").ok());
  ExpectChunkInvalid(Trailer({}, 7), "the trailer says 7 bytes");
  ExpectChunkInvalid(Trailer({{2, "0123456789abcdef"}}), "of tensor 2");
  ExpectChunkInvalid(Trailer({{1, "xyz"}}), "16 lower-case hex digits");
  const absl::Status status = Trailer({{1, "0123456789abcdef"}});
  EXPECT_EQ(GetReason(status), Reason::kDigestMismatch);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"b\""));
  EXPECT_FALSE(receiver_.finished());
}

TEST_F(TensorReceiverTest, DestinationRefusesTheTable) {
  memory_.table_status = MakeError(Reason::kUnknownKey, "no such parameter");
  ASSERT_TRUE(Header().ok());
  EXPECT_EQ(GetReason(Table()), Reason::kUnknownKey);
}

TEST_F(TensorReceiverTest, ClaimedCountsAllocateNothing) {
  EXPECT_EQ(GetReason(Header(uint64_t{1} << 62, 8)), Reason::kInvalidField);
  ASSERT_TRUE(receiver_
                  .Begin([] {
                    TensorReceiver::Options options;
                    options.tensor_count = 1000000;
                    options.total_bytes = uint64_t{1} << 60;
                    return options;
                  }())
                  .ok());
  EXPECT_EQ(receiver_.tensors().size(), 0u);
}

TEST_F(TensorReceiverTest, TakesRangesAndHashesOnlyWholeTensors) {
  options_.ranges = {{1, 4}, {6, 8}, {10, 12}};
  ASSERT_TRUE(Header(4, 12).ok());
  ASSERT_TRUE(Table({U8("a", 3, 0), U8("b", 5, 3), U8("c", 2, 8), U8("d", 2, 10)}).ok());
  ExpectChunkInvalid(Chunk(0, "a"), "where 1 is due");
  memory_.done = 1;
  ASSERT_TRUE(Chunk(1, "bcd").ok());
  memory_.done = 6;
  ExpectChunkInvalid(Chunk(6, "ghij"), "ends beyond 8");
  ASSERT_TRUE(Chunk(6, "gh").ok());
  memory_.done = 10;
  ASSERT_TRUE(Chunk(10, "kl").ok());
  ASSERT_TRUE(Trailer({{3, DigestToHex(Xxh3(AsBytes("kl")))}}).ok());
  EXPECT_FALSE(receiver_.digest(0).has_value());
  EXPECT_FALSE(receiver_.digest(1).has_value());
  EXPECT_FALSE(receiver_.digest(2).has_value());
  EXPECT_TRUE(receiver_.digest(3).has_value());
  EXPECT_EQ(receiver_.received_bytes(), 7u);
}

TEST_F(TensorReceiverTest, RefusesRangesOutsideTheRegion) {
  options_.ranges = {{4, 9}};
  EXPECT_EQ(GetReason(Header(2, 8)), Reason::kRangeOutsideLayout);
}

TEST_F(TensorReceiverTest, CanonicalPlacesMustBeTheLayouts) {
  options_.canonical_layout = true;
  ASSERT_TRUE(Header().ok());
  // By name within a width, so "a" is first.
  ExpectChunkInvalid(Table({U8("a", 3, 5), U8("b", 5, 0)}), "the layout's is 0");
}

TEST_F(TensorReceiverTest, CanonicalLayoutDigestMustAgree) {
  options_.canonical_layout = true;
  options_.layout_digest = std::string(32, '0');
  ASSERT_TRUE(Header().ok());
  EXPECT_EQ(GetReason(Table()), Reason::kLayoutMismatch);
}

TEST_F(TensorReceiverTest, InlineValuesAreBounded) {
  options_.max_inline_bytes = 10;
  ASSERT_TRUE(Header(2, 0).ok());
  v1::TensorInfo info = U8("a", 11, 0);
  info.mutable_values()->set_raw("01234567890");
  ExpectChunkInvalid(Table({info}), "inline values exceed");
}

// 100,000 small tensors in random chunks: the table in parts, pieces across tensors.
TEST(TensorReceiverProperty, ManySmallTensorsInRandomChunks) {
  constexpr uint64_t kSeed = 5;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937_64 random(kSeed);
  constexpr size_t kCount = 100000;
  std::vector<TensorSpec> specs(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    specs[i].name = absl::StrCat("layer", i, ".weight");
    specs[i].dtype = i % 3 == 0 ? DType::kF32 : DType::kU8;
    specs[i].shape = *Shape::Create({static_cast<int64_t>(random() % 9)});
  }
  const StateLayout layout(specs);
  std::string region(layout.total_bytes(), '\0');
  for (char& c : region) c = static_cast<char>(random());

  Memory memory;
  TensorReceiver receiver(&memory);
  TensorReceiver::Options options;
  options.tensor_count = kCount;
  options.total_bytes = layout.total_bytes();
  options.canonical_layout = true;
  options.layout_digest = layout.digest();
  ASSERT_TRUE(receiver.Begin(options).ok());
  TableSplitter splitter(kCount, [&](size_t i, v1::TensorInfo* info) {
    TensorSpecToProto(specs[i], info);
    info->set_offset(layout.range(i).begin);
  });
  v1::TensorTable table;
  int parts = 0;
  while (splitter.Next(&table)) {
    ++parts;
    EXPECT_LE(table.ByteSizeLong(), TableSplitter::kMaxPartBytes);
    ASSERT_TRUE(receiver.AddTable(table).ok());
  }
  EXPECT_GT(parts, 3);
  ChunkEncoder encoder;
  v1::Header header;
  for (uint64_t pos = 0; pos < region.size();) {
    const uint64_t size = std::min<uint64_t>(1 + random() % 50000, region.size() - pos);
    encoder.Begin(pos);
    encoder.AddCopied(AsBytes(region).subspan(pos, size));
    grpc::ByteBuffer message = encoder.Finish();
    const absl::Status status = receiver.Receive(&message, &header).status();
    ASSERT_TRUE(status.ok()) << status;
    pos += size;
  }
  v1::Trailer trailer;
  for (uint32_t i = 0; i < kCount; ++i) {
    v1::TensorDigest* digest = trailer.add_digests();
    digest->set_index(i);
    digest->set_xxh3(
        DigestToHex(Xxh3(AsBytes(region).subspan(layout.range(i).begin, layout.range(i).size()))));
  }
  ASSERT_TRUE(receiver.AddTrailer(trailer).ok());
  EXPECT_EQ(receiver.verified_digests(), kCount);
}

}  // namespace
}  // namespace modelstate
