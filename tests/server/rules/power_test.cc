#include "server/rules/power.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>

namespace modelstate {
namespace {

// Folds the bits of f(1) ... f(5000), as make_power_goldens.py does with numbers that it has
// rounded from 80 digits.
template <typename F>
uint64_t Fold(F f) {
  uint64_t sum = 0;
  for (uint64_t t = 1; t <= 5000; ++t) sum = sum * 31 + std::bit_cast<uint64_t>(f(t));
  return sum;
}

TEST(IntegerPowerTest, IsTheExactPowerRoundedOnce) {
  const auto fold = [](double base) {
    return Fold([base](uint64_t t) { return IntegerPower(base, t); });
  };
  EXPECT_EQ(fold(0.9), 0xb58fc5e22b82e8f3);
  EXPECT_EQ(fold(0.95), 0xb42b0dafe3106a22);
  EXPECT_EQ(fold(0.99), 0xfe342e0d9142bcdf);
  EXPECT_EQ(fold(0.999), 0xe84abb15f44cda51);
  EXPECT_EQ(fold(0.9999), 0x82462507f10af7f7);
  EXPECT_EQ(IntegerPower(0.9999, 494), 0x1.e75210acd7d48p-1);  // where libm's variants differ
  EXPECT_EQ(IntegerPower(0.9999999, 2'000'000'000), 0x1.60609c9f46a96p-289);
}

TEST(IntegerPowerTest, HasTheEdges) {
  for (const double base : {0.0, 0.5, 0.999, 1.0}) EXPECT_EQ(IntegerPower(base, 0), 1);
  EXPECT_EQ(IntegerPower(0, 3), 0);
  EXPECT_EQ(IntegerPower(1, ~uint64_t{0}), 1);
  EXPECT_EQ(1 - IntegerPower(0.999, ~uint64_t{0}), 1);
  EXPECT_EQ(1 - IntegerPower(0x1.fffffffffffffp-1, uint64_t{1} << 62), 1);
}

TEST(PowerOf096Test, IsTheExactPowerRoundedOnce) {
  EXPECT_EQ(Fold([](uint64_t t) { return PowerOf096(static_cast<double>(t) * 0.004); }),
            0x3f239958f09acc7f);
  EXPECT_EQ(PowerOf096(2.068), 0x1.d68d1a6bdb59fp-1);  // where libm's variants differ
  EXPECT_EQ(PowerOf096(4000), 0x1.57c1b364f8b60p-236);
}

TEST(PowerOf096Test, HasTheEdges) {
  EXPECT_EQ(PowerOf096(0), 1);
  EXPECT_EQ(PowerOf096(1), 0.96);
  EXPECT_EQ(PowerOf096(1e5), 0);
  EXPECT_EQ(PowerOf096(1e300), 0);
}

}  // namespace
}  // namespace modelstate
