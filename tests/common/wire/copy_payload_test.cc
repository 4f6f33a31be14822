#include "common/wire/copy_payload.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace modelstate {
namespace {

TEST(CopyPayloadTest, CopiesAllBytesAndNoOthersWhereverTheyBeginAndEnd) {
  constexpr uint32_t kSeed = 7;
  constexpr size_t kRoom = 20000;
  std::mt19937 random(kSeed);
  std::vector<uint8_t> source(kRoom);
  for (uint8_t& byte : source) byte = static_cast<uint8_t>(random());
  for (int i = 0; i < 2000; ++i) {
    const size_t from = random() % 100;
    const size_t to = random() % 100;
    const size_t size = i < 300 ? static_cast<size_t>(i) : 4000 + random() % 12000;
    std::vector<uint8_t> destination(kRoom, 0xA5);
    std::vector<uint8_t> expected = destination;
    std::copy_n(source.begin() + static_cast<int64_t>(from), size,
                expected.begin() + static_cast<int64_t>(to));
    CopyPayload(destination.data() + to, source.data() + from, size);
    ASSERT_EQ(destination, expected)
        << size << " bytes from " << from << " to " << to << ", seed " << kSeed;
  }
}

}  // namespace
}  // namespace modelstate
