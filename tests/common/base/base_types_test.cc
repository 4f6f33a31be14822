// DType, Shape, StateLayout, Selection, Status payloads and digests.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "common/base/digest.h"
#include "common/base/dtype.h"
#include "common/base/selection.h"
#include "common/base/shape.h"
#include "common/base/state_layout.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

Shape MakeShape(const std::vector<int64_t>& dims) {
  absl::StatusOr<Shape> shape = Shape::Create(dims);
  EXPECT_TRUE(shape.ok()) << shape.status();
  return *shape;
}

TensorSpec Spec(std::string name, DType dtype, const std::vector<int64_t>& dims,
                std::string alias_of = "") {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.dtype = dtype;
  spec.shape = MakeShape(dims);
  spec.alias_of = std::move(alias_of);
  return spec;
}

TEST(DTypeTest, NamesRoundTripAndAreUnique) {
  std::set<std::string> names;
  for (DType dtype : kAllDTypes) {
    EXPECT_EQ(ParseDType(DTypeName(dtype)), dtype);
    names.insert(std::string(DTypeName(dtype)));
  }
  EXPECT_EQ(names.size(), std::size(kAllDTypes));
  EXPECT_EQ(ParseDType("f32"), std::nullopt);
  EXPECT_EQ(ParseDType("F4"), std::nullopt);
  EXPECT_EQ(ParseDType(""), std::nullopt);
}

TEST(DTypeTest, SizesAndKinds) {
  EXPECT_EQ(DTypeSize(DType::kF64), 8u);
  EXPECT_EQ(DTypeSize(DType::kC64), 8u);
  EXPECT_EQ(DTypeSize(DType::kF32), 4u);
  EXPECT_EQ(DTypeSize(DType::kBF16), 2u);
  EXPECT_EQ(DTypeSize(DType::kF8E5M2), 1u);
  EXPECT_EQ(DTypeSize(DType::kBool), 1u);
  EXPECT_TRUE(IsFloatingPoint(DType::kF8E4M3));
  EXPECT_FALSE(IsFloatingPoint(DType::kC64));
  EXPECT_TRUE(CanRequireGrad(DType::kC64));
  EXPECT_FALSE(CanRequireGrad(DType::kI64));
  EXPECT_FALSE(CanRequireGrad(DType::kBool));
}

TEST(ShapeTest, CountsElements) {
  EXPECT_EQ(Shape().num_elements(), 1);
  EXPECT_EQ(Shape().ToString(), "[]");
  EXPECT_EQ(MakeShape({2, 3}).num_elements(), 6);
  EXPECT_EQ(MakeShape({2, 3}).ToString(), "[2, 3]");
  EXPECT_EQ(MakeShape({5, 0, 7}).num_elements(), 0);
  EXPECT_NE(MakeShape({2, 3}), MakeShape({3, 2}));
}

TEST(ShapeTest, RefusesNegativeAndOverflowInAnyOrder) {
  const int64_t huge = std::numeric_limits<int64_t>::max();
  for (const std::vector<int64_t>& dims : {std::vector<int64_t>{-1},
                                           {2, -3},
                                           {huge},
                                           {huge, 2, 0},
                                           {0, huge, 2},
                                           {2, 0, huge},
                                           {int64_t{1} << 31, int64_t{1} << 31}}) {
    EXPECT_EQ(Shape::Create(dims).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(Shape::Create({int64_t{1} << 58, 0}).ok());
  EXPECT_TRUE(Shape::Create(std::vector<int64_t>(64, 1)).ok());
  EXPECT_FALSE(Shape::Create(std::vector<int64_t>(65, 1)).ok());
}

TEST(StateLayoutTest, PlacesByWidthThenName) {
  const std::vector<TensorSpec> specs = {
      Spec("b", DType::kF32, {2}),    Spec("flag", DType::kBool, {3}),
      Spec("a", DType::kF32, {1}),    Spec("count", DType::kI64, {}),
      Spec("none", DType::kF32, {0}), Spec("tied", DType::kF32, {2}, "b")};
  const StateLayout layout(specs);
  EXPECT_EQ(layout.range(3), (ByteRange{0, 8}));
  EXPECT_EQ(layout.range(2), (ByteRange{8, 12}));
  EXPECT_EQ(layout.range(0), (ByteRange{12, 20}));
  EXPECT_EQ(layout.range(4), (ByteRange{20, 20}));
  EXPECT_EQ(layout.range(1), (ByteRange{20, 23}));
  EXPECT_EQ(layout.range(5), layout.range(0));
  EXPECT_TRUE(layout.owns_bytes(0));
  EXPECT_FALSE(layout.owns_bytes(5));
  EXPECT_EQ(layout.total_bytes(), 23u);
  EXPECT_THAT(layout.by_offset(), ElementsAre(3, 2, 0, 4, 1));
}

TEST(StateLayoutTest, AliasWithoutItsOwnerTakesAPlace) {
  const StateLayout layout(
      {Spec("x", DType::kF32, {2}, "gone"), Spec("y", DType::kF32, {2}, "gone")});
  EXPECT_TRUE(layout.owns_bytes(0));
  EXPECT_FALSE(layout.owns_bytes(1));
  EXPECT_EQ(layout.total_bytes(), 8u);
}

TEST(StateLayoutTest, FindsTheTensorOfEachByte) {
  const StateLayout layout(
      {Spec("a", DType::kF32, {2}), Spec("b", DType::kF32, {0}), Spec("c", DType::kU8, {1})});
  for (uint64_t offset = 0; offset < 8; ++offset) EXPECT_EQ(layout.FindPosition(offset), 0u);
  EXPECT_EQ(layout.FindPosition(8), 2u);
  EXPECT_EQ(layout.FindPosition(9), 3u);
}

TEST(StateLayoutTest, DigestNamesTheLayout) {
  const std::vector<TensorSpec> specs = {Spec("a", DType::kF32, {2}), Spec("b", DType::kF32, {3})};
  const std::string digest = StateLayout(specs).digest();
  EXPECT_EQ(digest.size(), 32u);
  EXPECT_EQ(StateLayout(specs).digest(), digest);
  EXPECT_NE(StateLayout({specs[1], specs[0]}).digest(), digest);
  EXPECT_NE(StateLayout({Spec("a", DType::kI32, {2}), specs[1]}).digest(), digest);
  EXPECT_NE(StateLayout({Spec("a", DType::kF32, {2, 1}), specs[1]}).digest(), digest);
  EXPECT_NE(StateLayout({Spec("A", DType::kF32, {2}), specs[1]}).digest(), digest);
}

TEST(GlobTest, MatchesAsFnmatchDoes) {
  EXPECT_TRUE(GlobMatch("*.running_*", "layer1.0.bn1.running_mean"));
  EXPECT_FALSE(GlobMatch("*.running_*", "running_mean"));
  EXPECT_TRUE(GlobMatch("*", ""));
  EXPECT_TRUE(GlobMatch("conv?.weight", "conv1.weight"));
  EXPECT_FALSE(GlobMatch("conv?.weight", "conv12.weight"));
  EXPECT_TRUE(GlobMatch("[!a-c]x", "dx"));
  EXPECT_FALSE(GlobMatch("[!a-c]x", "bx"));
  EXPECT_TRUE(GlobMatch("[abc]x", "bx"));
  EXPECT_TRUE(GlobMatch("[]]", "]"));
  EXPECT_TRUE(GlobMatch("a[b", "a[b"));
  EXPECT_FALSE(GlobMatch("", "a"));
  EXPECT_TRUE(GlobMatch("a*b*c", "axxbyyc"));
  EXPECT_FALSE(GlobMatch("a*b*c", "axxbyy"));
}

TEST(GlobTest, ManyStarsStayFast) {
  std::string pattern;
  for (int i = 0; i < 50; ++i) pattern += "a*";
  EXPECT_FALSE(GlobMatch(pattern + "b", std::string(5000, 'a')));
}

TEST(SelectTest, CombinesNamesPrefixesGlobsAndKinds) {
  std::vector<TensorSpec> specs = {
      Spec("a.weight", DType::kF32, {1}), Spec("a.running_mean", DType::kF32, {1}),
      Spec("b.weight", DType::kF32, {1}), Spec("b.cache", DType::kF32, {1})};
  specs[1].kind = TensorKind::kBuffer;
  specs[3].kind = TensorKind::kBuffer;
  specs[3].persistent = false;
  std::vector<std::string> unknown;
  Selection selection;
  EXPECT_THAT(Select(selection, specs, &unknown), ElementsAre(0, 1, 2));
  selection.include_non_persistent = true;
  EXPECT_THAT(Select(selection, specs, &unknown), ElementsAre(0, 1, 2, 3));
  selection = {};
  selection.prefixes = {"a."};
  selection.names = {"b.weight", "missing"};
  EXPECT_THAT(Select(selection, specs, &unknown), ElementsAre(0, 1, 2));
  EXPECT_THAT(unknown, ElementsAre("missing"));
  selection = {};
  selection.globs = {"*.weight"};
  EXPECT_THAT(Select(selection, specs, &unknown), ElementsAre(0, 2));
  selection.kinds = {TensorKind::kBuffer};
  EXPECT_THAT(Select(selection, specs, &unknown), ElementsAre());
  selection = {};
  selection.names = {"b.cache"};  // by its name also a non-persistent buffer comes
  EXPECT_THAT(Select(selection, specs, &unknown), ElementsAre(3));
}

TEST(StatusTest, PayloadCarriesReasonAndMetadata) {
  const absl::Status status =
      MakeError(Reason::kNotAParameter, "tensor \"bn.running_mean\" is a buffer",
                {{"tensor", "bn.running_mean"}, {"kind", "buffer"}});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GetReason(status), Reason::kNotAParameter);
  EXPECT_EQ(GetErrorMetadata(status),
            (ErrorMetadata{{"tensor", "bn.running_mean"}, {"kind", "buffer"}}));
  const absl::Status annotated = Annotate(status, "push");
  EXPECT_EQ(annotated.message(), "push: tensor \"bn.running_mean\" is a buffer");
  EXPECT_EQ(GetReason(annotated), Reason::kNotAParameter);
  EXPECT_EQ(GetErrorMetadata(annotated), GetErrorMetadata(status));
  EXPECT_EQ(GetReason(absl::InternalError("x")), std::nullopt);
}

TEST(StatusTest, EveryReasonHasItsRow) {
  for (int i = 0; i <= static_cast<int>(Reason::kStorageError); ++i) {
    const Reason reason = static_cast<Reason>(i);
    EXPECT_EQ(ParseReason(ReasonName(reason)), reason);
    EXPECT_EQ(MakeError(reason, "x").code(), ReasonCode(reason));
    EXPECT_EQ(GetReason(MakeError(reason, "x")), reason);
  }
  EXPECT_EQ(ParseReason("NO_SUCH"), std::nullopt);
}

TEST(StatusTest, LongTextsAreCutBetweenCharacters) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += "ж";
  const absl::Status status = MakeError(Reason::kUnknownKey, text);
  EXPECT_LE(status.message().size(), 1024u);
  EXPECT_GE(status.message().size(), 1000u);
  EXPECT_EQ((status.message().size() - 3) % 2, 0u);
}

TEST(StatusTest, RetryAfterRoundTrips) {
  const absl::Status status =
      WithRetryAfter(MakeError(Reason::kPushMemory, "full"), absl::Milliseconds(1500));
  EXPECT_EQ(GetRetryAfter(status), absl::Milliseconds(1500));
  EXPECT_EQ(GetReason(status), Reason::kPushMemory);
  EXPECT_EQ(GetRetryAfter(absl::OkStatus()), std::nullopt);
}

TEST(StatusTest, ErrnoErrorTellsFullFromBroken) {
  EXPECT_EQ(GetReason(ErrnoError(ENOSPC, "write x")), Reason::kStorageFull);
  EXPECT_EQ(GetReason(ErrnoError(EIO, "write x")), Reason::kStorageError);
  EXPECT_THAT(std::string(ErrnoError(EIO, "write x").message()), HasSubstr("cannot write x"));
}

TEST(StatusTest, QuotedListShowsTenAndACount) {
  std::vector<std::string> names;
  for (int i = 0; i < 12; ++i) names.push_back(std::to_string(i));
  EXPECT_EQ(QuotedList({"a", "b"}), "\"a\", \"b\"");
  EXPECT_THAT(QuotedList(names), HasSubstr("\"9\" and 2 more"));
}

absl::Span<const uint8_t> Bytes(absl::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

TEST(DigestTest, KnownAnswers) {
  // From the xxhash package for Python.
  EXPECT_EQ(DigestToHex(Xxh3({})), "2d06800538d394c2");
  EXPECT_EQ(DigestToHex(Xxh3(Bytes("modelstate"))), "78f0680a2400df8a");
  EXPECT_EQ(Xxh3Hex128(""), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(Xxh3Hex128("modelstate"), "7a0ff975fbf1d1cbe9340cee3d264356");
}

TEST(DigestTest, StreamEqualsOneShotForAnyPieces) {
  std::string text;
  for (int i = 0; i < 5000; ++i) text.push_back(static_cast<char>(i * 37));
  for (size_t piece : {1u, 7u, 240u, 1024u, 5000u}) {
    Xxh3Stream stream;
    stream.Update(Bytes("left over"));
    stream.Reset();
    for (size_t at = 0; at < text.size(); at += piece) {
      stream.Update(Bytes(absl::string_view(text).substr(at, piece)));
    }
    EXPECT_EQ(stream.Digest(), Xxh3(Bytes(text))) << piece;
  }
}

TEST(DigestTest, HexParsesOnlyItsOwnForm) {
  EXPECT_EQ(DigestFromHex("00000000000000ff"), 255u);
  EXPECT_EQ(DigestFromHex("00000000000000FF"), std::nullopt);
  EXPECT_EQ(DigestFromHex("ff"), std::nullopt);
  EXPECT_EQ(DigestFromHex("0x000000000000ff"), std::nullopt);
}

}  // namespace
}  // namespace modelstate
