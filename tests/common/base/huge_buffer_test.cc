#include "common/base/huge_buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

namespace modelstate {
namespace {

TEST(HugeBuffer, IsZeroAndBeginsAtAHugePage) {
  for (size_t bytes : {size_t{1}, kHugePageBytes - 1, kHugePageBytes + 5000}) {
    const HugeBuffer buffer(bytes);
    ASSERT_NE(buffer.data(), nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % kHugePageBytes, 0U);
    EXPECT_TRUE(
        std::all_of(buffer.data(), buffer.data() + bytes, [](uint8_t b) { return b == 0; }));
    std::fill(buffer.data(), buffer.data() + bytes, uint8_t{1});
  }
}

TEST(HugeBuffer, MovesItsMemoryAlong) {
  HugeBuffer first(4096);
  uint8_t* const memory = first.data();
  memory[0] = 7;
  HugeBuffer second(std::move(first));
  HugeBuffer third(8192);
  third = std::move(second);
  EXPECT_EQ(third.data(), memory);
  EXPECT_EQ(third.data()[0], 7);
  HugeBuffer nothing;
  EXPECT_EQ(nothing.data(), nullptr);
  third = std::move(nothing);
  EXPECT_EQ(third.data(), nullptr);
}

TEST(HugeBuffer, WhatNoAddressSpaceHoldsIsNull) {
  EXPECT_EQ(HugeBuffer(std::numeric_limits<size_t>::max()).data(), nullptr);
  EXPECT_EQ(HugeBuffer(size_t{1} << 60).data(), nullptr);
}

}  // namespace
}  // namespace modelstate
