#include "common/wire/convert.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "common/base/status.h"
#include "modelstate/v1/module.pb.h"
#include "modelstate/v1/state.pb.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

v1::TensorInfo Valid() {
  v1::TensorInfo info;
  info.set_name("conv1.weight");
  info.set_kind(v1::PARAMETER);
  info.set_dtype(v1::F32);
  info.add_shape(2);
  info.add_shape(3);
  return info;
}

TEST(Convert, EnumsHaveTheSameNumbers) {
  for (DType dtype : kAllDTypes) {
    EXPECT_EQ(v1::DType_Name(DTypeToProto(dtype)), std::string(DTypeName(dtype)));
    EXPECT_EQ(*DTypeFromProto(DTypeToProto(dtype), ""), dtype);
  }
  EXPECT_EQ(TensorKindToProto(TensorKind::kOptimizerState), v1::OPTIMIZER_STATE);
}

TEST(Convert, TensorSpecRoundTrip) {
  TensorSpec spec;
  spec.name = "bn.running_mean";
  spec.kind = TensorKind::kBuffer;
  spec.dtype = DType::kBF16;
  spec.shape = *Shape::Create({4, 0, 2});
  spec.persistent = false;
  spec.alias_of = "other";
  v1::TensorInfo info;
  TensorSpecToProto(spec, &info);
  EXPECT_FALSE(info.has_requires_grad());
  const absl::StatusOr<TensorSpec> back = TensorSpecFromProto(info, std::nullopt);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->name, spec.name);
  EXPECT_EQ(back->kind, spec.kind);
  EXPECT_EQ(back->dtype, spec.dtype);
  EXPECT_EQ(back->shape, spec.shape);
  EXPECT_FALSE(back->persistent);
  EXPECT_EQ(back->alias_of, "other");
}

TEST(Convert, RefusesWhatIsMalformedAndNamesTheTensor) {
  struct Row {
    const char* what;
    std::function<void(v1::TensorInfo*)> spoil;
  };
  const Row rows[] = {
      {"empty name", [](v1::TensorInfo* info) { info->clear_name(); }},
      {"NUL", [](v1::TensorInfo* info) { info->set_name(std::string("a\0b", 3)); }},
      {"long name", [](v1::TensorInfo* info) { info->set_name(std::string(1025, 'a')); }},
      {"surrogate", [](v1::TensorInfo* info) { *info->mutable_name() = "\xED\xA0\x80"; }},
      {"overlong", [](v1::TensorInfo* info) { *info->mutable_name() = "\xC0\xAF"; }},
      {"cut", [](v1::TensorInfo* info) { *info->mutable_name() = "\xE2\x82"; }},
      {"no kind", [](v1::TensorInfo* info) { info->clear_kind(); }},
      {"kind", [](v1::TensorInfo* info) { info->set_kind(static_cast<v1::TensorKind>(99)); }},
      {"no dtype", [](v1::TensorInfo* info) { info->clear_dtype(); }},
      {"dtype", [](v1::TensorInfo* info) { info->set_dtype(static_cast<v1::DType>(17)); }},
      {"negative dtype", [](v1::TensorInfo* info) { info->set_dtype(static_cast<v1::DType>(-1)); }},
      {"negative dimension", [](v1::TensorInfo* info) { info->set_shape(0, -1); }},
      {"overflow", [](v1::TensorInfo* info) { info->set_shape(0, int64_t{1} << 62); }},
      {"nbytes", [](v1::TensorInfo* info) { info->set_nbytes(25); }},
      {"self alias", [](v1::TensorInfo* info) { info->set_alias_of(info->name()); }},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.what);
    v1::TensorInfo info = Valid();
    row.spoil(&info);
    const absl::Status status = TensorSpecFromProto(info, std::nullopt).status();
    EXPECT_EQ(GetReason(status), Reason::kInvalidField) << status;
    if (info.name() == "conv1.weight") {
      EXPECT_THAT(std::string(status.message()), HasSubstr("conv1.weight"));
    }
  }
  EXPECT_TRUE(TensorSpecFromProto(Valid(), std::nullopt).ok());
  v1::TensorInfo info = Valid();
  info.clear_kind();
  EXPECT_EQ(TensorSpecFromProto(info, TensorKind::kGradient)->kind, TensorKind::kGradient);
}

TEST(Convert, TiedTensorsOfASpec) {
  v1::ModuleSpec spec;
  *spec.add_tensors() = Valid();
  spec.add_tensors()->set_name("head.weight");
  spec.mutable_tensors(1)->set_alias_of("conv1.weight");
  absl::StatusOr<std::vector<TensorSpec>> specs = TensorSpecsFromProto(spec.tensors());
  ASSERT_TRUE(specs.ok()) << specs.status();
  EXPECT_EQ((*specs)[1].shape, (*specs)[0].shape);
  EXPECT_EQ((*specs)[1].alias_of, "conv1.weight");

  spec.mutable_tensors(1)->set_dtype(v1::F16);
  EXPECT_EQ(GetReason(TensorSpecsFromProto(spec.tensors()).status()), Reason::kInvalidField);
  spec.mutable_tensors(1)->clear_dtype();
  spec.mutable_tensors(1)->set_alias_of("missing");
  EXPECT_EQ(GetReason(TensorSpecsFromProto(spec.tensors()).status()), Reason::kUnknownKey);
  *spec.mutable_tensors(1) = Valid();
  EXPECT_EQ(GetReason(TensorSpecsFromProto(spec.tensors()).status()), Reason::kInvalidField);
}

TEST(Convert, SelectionRoundTripAndErrors) {
  Selection selection;
  selection.names = {"a"};
  selection.globs = {"*.b"};
  selection.kinds = {TensorKind::kBuffer};
  selection.float_dtype = DType::kBF16;
  v1::Selection proto;
  SelectionToProto(selection, &proto);
  const absl::StatusOr<Selection> back = SelectionFromProto(proto);
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back->names, selection.names);
  EXPECT_EQ(back->globs, selection.globs);
  EXPECT_EQ(back->kinds, selection.kinds);
  EXPECT_EQ(back->float_dtype, selection.float_dtype);
  proto.set_float_dtype(v1::I64);
  EXPECT_EQ(GetReason(SelectionFromProto(proto).status()), Reason::kInvalidField);
  proto.clear_float_dtype();
  proto.add_kinds(static_cast<v1::TensorKind>(9));
  EXPECT_EQ(GetReason(SelectionFromProto(proto).status()), Reason::kInvalidField);
}

TEST(Convert, SelectionIsBounded) {
  const auto refused = [](const v1::Selection& proto, const char* field, const char* limit) {
    const absl::Status status = SelectionFromProto(proto).status();
    EXPECT_EQ(GetReason(status), Reason::kInvalidField) << status;
    for (const char* part : {field, limit, "several calls"}) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    }
  };
  const std::string longest(1024, '*');
  const std::string too_long(1025, '*');
  v1::Selection full;
  for (int i = 0; i < 64; ++i) {
    full.add_globs(longest);
    full.add_prefixes(longest);
  }
  // gcc 12 takes literals in loops for overlapping copies.
  const std::string name = "n";
  for (int i = 0; i < 1000000; ++i) full.add_names(name);
  EXPECT_TRUE(SelectionFromProto(full).ok());

  v1::Selection proto = full;
  proto.add_globs("*");
  refused(proto, "selection.globs", "64");
  proto = full;
  proto.add_prefixes("p");
  refused(proto, "selection.prefixes", "64");
  proto = full;
  proto.add_names("n");
  refused(proto, "selection.names", "1000000");
  proto.Clear();
  proto.add_globs(too_long);
  refused(proto, "selection.globs", "1024");
  proto.Clear();
  proto.add_prefixes(too_long);
  refused(proto, "selection.prefixes", "1024");
}

TEST(Convert, SelectionHasEachKindOnce) {
  v1::Selection proto;
  for (int i = 0; i < 1000; ++i) proto.add_kinds(i % 2 == 0 ? v1::BUFFER : v1::PARAMETER);
  EXPECT_EQ(SelectionFromProto(proto)->kinds,
            (std::vector<TensorKind>{TensorKind::kBuffer, TensorKind::kParameter}));
}

TEST(Convert, RangesAreAscendingAndJoined) {
  v1::StreamStateDictRequest request;
  const auto add = [&](uint64_t begin, uint64_t end) {
    ByteRangeToProto({begin, end}, request.add_ranges());
  };
  add(0, 4);
  add(4, 6);
  add(7, 7);
  add(8, 9);
  absl::StatusOr<std::vector<ByteRange>> ranges = ByteRangesFromProto(request.ranges());
  ASSERT_TRUE(ranges.ok());
  EXPECT_THAT(*ranges, ElementsAre(ByteRange{0, 6}, ByteRange{8, 9}));
  add(8, 10);
  EXPECT_EQ(GetReason(ByteRangesFromProto(request.ranges()).status()), Reason::kInvalidField);
  request.clear_ranges();
  add(3, 2);
  EXPECT_EQ(GetReason(ByteRangesFromProto(request.ranges()).status()), Reason::kInvalidField);
}

TEST(Convert, Durations) {
  google::protobuf::Duration proto;
  DurationToProto(absl::Milliseconds(1500), &proto);
  EXPECT_EQ(*DurationFromProto(proto, "lease"), absl::Milliseconds(1500));
  proto.set_seconds(-1);
  EXPECT_THAT(std::string(DurationFromProto(proto, "lease").status().message()),
              HasSubstr("lease"));
  proto.set_seconds(int64_t{1} << 62);
  const absl::Status longest = DurationFromProto(proto, "lease").status();
  EXPECT_THAT(std::string(longest.message()), HasSubstr("at most 315576000000 (10,000 years)"));
  EXPECT_EQ(GetErrorMetadata(longest)["field"], "lease");
  proto.set_seconds(1);
  proto.set_nanos(1'000'000'000);
  EXPECT_THAT(std::string(DurationFromProto(proto, "lease").status().message()),
              HasSubstr("at most 999999999"));
  google::protobuf::Timestamp time;
  TimeToProto(absl::FromUnixMillis(1700000000123), &time);
  EXPECT_EQ(TimeFromProto(time), absl::FromUnixMillis(1700000000123));
}

}  // namespace
}  // namespace modelstate
