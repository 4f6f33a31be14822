#include "common/wire/values_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "common/base/status.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

v1::Values Doubles(std::initializer_list<double> values) {
  v1::Values result;
  for (double value : values) result.mutable_doubles()->add_values(value);
  return result;
}

v1::Values Ints(std::initializer_list<int64_t> values) {
  v1::Values result;
  for (int64_t value : values) result.mutable_ints()->add_values(value);
  return result;
}

absl::StatusOr<std::string> Encode(const v1::Values& values, DType dtype, int64_t count = 1) {
  std::string out;
  MS_RETURN_IF_ERROR(EncodeValues(values, dtype, count, &out));
  EXPECT_EQ(out.size(), static_cast<size_t>(count) * DTypeSize(dtype));
  return out;
}

bool Fits(const v1::Values& values, DType dtype) {
  const absl::StatusOr<std::string> encoded = Encode(values, dtype);
  if (!encoded.ok()) {
    EXPECT_EQ(GetReason(encoded.status()), Reason::kNotRepresentable);
  }
  return encoded.ok();
}

TEST(EncodeValues, IntegerRanges) {
  struct Row {
    DType dtype;
    int64_t low, high;
  };
  for (const Row& row :
       {Row{DType::kI8, -128, 127}, Row{DType::kU8, 0, 255}, Row{DType::kI16, -32768, 32767},
        Row{DType::kU16, 0, 65535}, Row{DType::kI32, -2147483648LL, 2147483647LL},
        Row{DType::kU32, 0, 4294967295LL}, Row{DType::kBool, 0, 1}}) {
    SCOPED_TRACE(std::string(DTypeName(row.dtype)));
    EXPECT_TRUE(Fits(Ints({row.low}), row.dtype));
    EXPECT_TRUE(Fits(Ints({row.high}), row.dtype));
    EXPECT_FALSE(Fits(Ints({row.low - 1}), row.dtype));
    EXPECT_FALSE(Fits(Ints({row.high + 1}), row.dtype));
    EXPECT_TRUE(Fits(Doubles({static_cast<double>(row.low)}), row.dtype));
    EXPECT_TRUE(Fits(Doubles({static_cast<double>(row.high)}), row.dtype));
    EXPECT_FALSE(Fits(Doubles({static_cast<double>(row.low) - 1}), row.dtype));
    EXPECT_FALSE(Fits(Doubles({static_cast<double>(row.high) + 1}), row.dtype));
  }
  EXPECT_TRUE(Fits(Ints({std::numeric_limits<int64_t>::min()}), DType::kI64));
  EXPECT_TRUE(Fits(Doubles({-0x1p63}), DType::kI64));
  EXPECT_FALSE(Fits(Doubles({0x1p63}), DType::kI64));
  EXPECT_TRUE(Fits(Doubles({0x1p63}), DType::kU64));
  EXPECT_FALSE(Fits(Doubles({0x1p64}), DType::kU64));
  EXPECT_FALSE(Fits(Ints({-1}), DType::kU64));
  EXPECT_TRUE(Fits(Doubles({-0.0}), DType::kU64));
}

TEST(EncodeValues, NothingFractionalOrNotFiniteIntoIntegers) {
  for (DType dtype : {DType::kI64, DType::kU8, DType::kBool}) {
    EXPECT_FALSE(Fits(Doubles({0.5}), dtype));
    EXPECT_FALSE(Fits(Doubles({std::nan("")}), dtype));
    EXPECT_FALSE(Fits(Doubles({INFINITY}), dtype));
    EXPECT_FALSE(Fits(Doubles({-INFINITY}), dtype));
  }
}

TEST(EncodeValues, FloatsRoundAndRefuseOverflow) {
  struct Row {
    DType dtype;
    double largest, overflows;
  };
  for (const Row& row :
       {Row{DType::kF32, 3.4028234663852886e38, 3.5e38}, Row{DType::kF16, 65519, 65520},
        Row{DType::kBF16, 3.38e38, 3.4e38}, Row{DType::kF8E5M2, 57344, 61440},
        Row{DType::kF8E4M3, 464, 465}, Row{DType::kC64, 1, 3.5e38}}) {
    SCOPED_TRACE(std::string(DTypeName(row.dtype)));
    const auto values = [&](double value) {
      return row.dtype == DType::kC64 ? Doubles({value, 0}) : Doubles({value});
    };
    EXPECT_TRUE(Fits(values(row.largest), row.dtype));
    EXPECT_FALSE(Fits(values(row.overflows), row.dtype));
    EXPECT_FALSE(Fits(values(-row.overflows), row.dtype));
    EXPECT_TRUE(Fits(values(0.1), row.dtype));
    EXPECT_TRUE(Fits(values(std::nan("")), row.dtype));
    EXPECT_EQ(Fits(values(INFINITY), row.dtype), row.dtype != DType::kF8E4M3);
  }
  EXPECT_EQ(*Encode(Doubles({65519}), DType::kF16), std::string("\xFF\x7B", 2));  // 65504
}

TEST(EncodeValues, IntsIntoFloatsMustBeExactAsDoubles) {
  EXPECT_TRUE(Fits(Ints({int64_t{1} << 53}), DType::kF64));
  EXPECT_FALSE(Fits(Ints({(int64_t{1} << 53) + 1}), DType::kF64));
  EXPECT_FALSE(Fits(Ints({std::numeric_limits<int64_t>::max()}), DType::kF32));
  EXPECT_TRUE(Fits(Ints({int64_t{1} << 62}), DType::kF32));
  EXPECT_FALSE(Fits(Ints({70000}), DType::kF16));
}

TEST(EncodeValues, CountsMustAgree) {
  absl::Status status = Encode(Doubles({1, 2}), DType::kF32, 3).status();
  EXPECT_EQ(GetReason(status), Reason::kShapeMismatch);
  EXPECT_THAT(std::string(status.message()), HasSubstr("there are 2 values, the shape has 3"));
  EXPECT_TRUE(Encode(Doubles({1, 2}), DType::kC64, 1).ok());
  EXPECT_EQ(GetReason(Encode(Doubles({1}), DType::kC64, 1).status()), Reason::kShapeMismatch);
  v1::Values raw;
  raw.set_raw("abc");
  EXPECT_EQ(GetReason(Encode(raw, DType::kF32).status()), Reason::kShapeMismatch);
  EXPECT_EQ(GetReason(Encode(v1::Values(), DType::kF32).status()), Reason::kInvalidField);
}

TEST(EncodeValues, ErrorsNameTheIndex) {
  const absl::Status status = Encode(Ints({1, 300}), DType::kU8, 2).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("values[1] is 300, which U8 cannot hold"));
}

TEST(DecodeValues, RoundTripsEveryDType) {
  for (DType dtype : kAllDTypes) {
    SCOPED_TRACE(std::string(DTypeName(dtype)));
    const v1::Values typed = dtype == DType::kC64 ? Doubles({1, 0, 0, 1}) : Doubles({1, 0});
    const absl::StatusOr<std::string> bytes = Encode(typed, dtype, 2);
    ASSERT_TRUE(bytes.ok());
    const v1::Values decoded = DecodeValues(
        absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes->data()), bytes->size()), dtype);
    EXPECT_EQ(*Encode(decoded, dtype, 2), *bytes);
    EXPECT_EQ(decoded.has_doubles(), CanRequireGrad(dtype));
  }
}

TEST(DecodeValues, LargeU64AreDoubles) {
  const uint64_t values[] = {1, uint64_t{1} << 63};
  const auto bytes = absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(values), 16);
  EXPECT_THAT(DecodeValues(bytes, DType::kU64).doubles().values(), ElementsAre(1, 0x1p63));
  EXPECT_THAT(DecodeValues(bytes.subspan(0, 8), DType::kU64).ints().values(), ElementsAre(1));
}

}  // namespace
}  // namespace modelstate
