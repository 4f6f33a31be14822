#include "common/base/tensor_cast.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/base/float_cast.h"

namespace modelstate {
namespace {

template <typename To, typename From>
To Cast(DType from, From value, DType to) {
  To result{};
  EXPECT_EQ(sizeof(From), DTypeSize(from));
  EXPECT_EQ(sizeof(To), DTypeSize(to));
  CastElements(from, reinterpret_cast<const uint8_t*>(&value), to,
               reinterpret_cast<uint8_t*>(&result), 1);
  return result;
}

TEST(FloatCast, NarrowValuesSurviveARoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if (!std::isnan(HalfToFloat(half))) {
      ASSERT_EQ(FloatToHalf(HalfToFloat(half)), half);
    }
    if (!std::isnan(BFloat16ToFloat(half))) {
      ASSERT_EQ(FloatToBFloat16(BFloat16ToFloat(half)), half);
    }
    const auto byte = static_cast<uint8_t>(bits);
    if (!std::isnan(F8E4M3ToFloat(byte))) {
      ASSERT_EQ(FloatToF8E4M3(F8E4M3ToFloat(byte)), byte);
    }
    if (!std::isnan(F8E5M2ToFloat(byte))) {
      ASSERT_EQ(FloatToF8E5M2(F8E5M2ToFloat(byte)), byte);
    }
  }
}

TEST(FloatCast, RoundsToNearestEvenAndOverflowsAsTorch) {
  EXPECT_EQ(HalfToFloat(FloatToHalf(65519.0f)), 65504.0f);
  EXPECT_TRUE(std::isinf(HalfToFloat(FloatToHalf(65520.0f))));
  EXPECT_EQ(FloatToHalf(1.0f + 0x1p-11f), FloatToHalf(1.0f)) << "a tie goes to even";
  EXPECT_EQ(HalfToFloat(FloatToHalf(1.0f + 3 * 0x1p-11f)), 1.0f + 0x1p-9f);
  EXPECT_EQ(FloatToHalf(0x1p-25f), 0) << "a tie of subnormals";
  EXPECT_EQ(FloatToHalf(0x1.8p-25f), 1);
  EXPECT_EQ(F8E4M3ToFloat(FloatToF8E4M3(464.0f)), 448.0f);
  EXPECT_TRUE(std::isnan(F8E4M3ToFloat(FloatToF8E4M3(465.0f))));
  EXPECT_TRUE(std::isnan(F8E4M3ToFloat(FloatToF8E4M3(-INFINITY))));
  EXPECT_TRUE(std::isinf(F8E5M2ToFloat(FloatToF8E5M2(61440.0f))));
  EXPECT_EQ(FloatToBFloat16(std::nanf("")), 0x7FC0);
  EXPECT_EQ(FloatToHalf(-0.0f), 0x8000);
}

TEST(TensorCast, DefinesWhatCppLeavesUndefined) {
  constexpr auto kMin64 = std::numeric_limits<int64_t>::min();
  constexpr auto kMin32 = std::numeric_limits<int32_t>::min();
  EXPECT_EQ((Cast<int64_t>(DType::kF32, std::nanf(""), DType::kI64)), kMin64);
  EXPECT_EQ((Cast<int64_t>(DType::kF64, 1e30, DType::kI64)), kMin64);
  EXPECT_EQ((Cast<int32_t>(DType::kF64, 3e9, DType::kI32)), kMin32);
  EXPECT_EQ((Cast<int32_t>(DType::kF64, -2147483648.9, DType::kI32)), kMin32);
  EXPECT_EQ((Cast<uint8_t>(DType::kF32, std::nanf(""), DType::kBool)), 1);
  EXPECT_EQ((Cast<uint8_t>(DType::kF32, 0.25f, DType::kBool)), 1);
  EXPECT_EQ((Cast<uint8_t>(DType::kF32, -0.0f, DType::kBool)), 0);
  EXPECT_EQ((Cast<uint8_t>(DType::kF32, -1.0f, DType::kU8)), 255);
  EXPECT_EQ((Cast<uint8_t>(DType::kF32, 300.0f, DType::kU8)), 44);
  EXPECT_EQ((Cast<uint64_t>(DType::kF64, -1.0, DType::kU64)), UINT64_MAX);
  EXPECT_EQ((Cast<uint64_t>(DType::kF64, 0x1p63, DType::kU64)), uint64_t{1} << 63);
  EXPECT_EQ((Cast<int64_t>(DType::kF32, -2.9f, DType::kI64)), -2);
}

TEST(TensorCast, ComplexAndBool) {
  const float complex[2] = {0.0f, 2.0f};
  float real = 1;
  CastElements(DType::kC64, reinterpret_cast<const uint8_t*>(complex), DType::kF32,
               reinterpret_cast<uint8_t*>(&real), 1);
  EXPECT_EQ(real, 0.0f);
  uint8_t flag = 0;
  CastElements(DType::kC64, reinterpret_cast<const uint8_t*>(complex), DType::kBool, &flag, 1);
  EXPECT_EQ(flag, 1);
  EXPECT_EQ((Cast<float>(DType::kBool, uint8_t{7}, DType::kF32)), 1.0f);
}

TEST(TensorCast, EveryPairKeepsZeroAndOneUnaligned) {
  for (DType from : kAllDTypes) {
    for (DType to : kAllDTypes) {
      const uint8_t flags[3] = {1, 0, 1};
      std::vector<uint8_t> source(3 * DTypeSize(from) + 1);
      std::vector<uint8_t> target(3 * DTypeSize(to) + 1);
      uint8_t back[3] = {};
      CastElements(DType::kBool, flags, from, source.data() + 1, 3);
      CastElements(from, source.data() + 1, to, target.data() + 1, 3);
      CastElements(to, target.data() + 1, DType::kBool, back, 3);
      EXPECT_EQ(std::memcmp(flags, back, 3), 0) << DTypeName(from) << " to " << DTypeName(to);
    }
  }
}

}  // namespace
}  // namespace modelstate
