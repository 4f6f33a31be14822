#include "server/state/cast_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/tensor_cast.h"

namespace modelstate {
namespace {

class CastCacheTest : public ::testing::Test {
 protected:
  explicit CastCacheTest(uint64_t elements = 700'001)
      : source_(elements * sizeof(float)), expected_(elements * 2) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < elements; ++i) {
      const float value = normal(random);
      std::memcpy(source_.data() + i * sizeof(float), &value, sizeof(float));
    }
    CastElements(DType::kF32, source_.data(), DType::kBF16, expected_.data(),
                 static_cast<int64_t>(elements));
  }

  RefPtr<CastTensor> Find(CastCache& cache, uint32_t index) {
    return cache.Find(index, DType::kF32, DType::kBF16, expected_.size(), *budget_);
  }

  std::vector<uint8_t> source_;
  std::vector<uint8_t> expected_;
  std::shared_ptr<MemoryBudget> budget_ = std::make_shared<MemoryBudget>(
      Reason::kSnapshotLimit, "casts", "--cast_memory_bytes", 3'000'000);
};

TEST_F(CastCacheTest, AnyPartIsThatOfTheWholeCast) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    CastCache cache;
    const RefPtr<CastTensor> cast = Find(cache, 5);
    ASSERT_TRUE(cast);
    for (int i = 0; i < 20; ++i) {
      const uint64_t begin = random() % expected_.size();
      const uint64_t end = begin + 1 + random() % (expected_.size() - begin);
      const absl::Span<const uint8_t> part = cast->Get(source_, begin, end);
      ASSERT_EQ(part.size(), end - begin);
      ASSERT_EQ(std::memcmp(part.data(), expected_.data() + begin, part.size()), 0);
    }
  }
}

TEST_F(CastCacheTest, ThreadsMakeEachPieceOnceAndNeverSeeHalfOfOne) {
  CastCache cache;
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      const RefPtr<CastTensor> cast = Find(cache, 0);
      ASSERT_TRUE(cast);
      for (int i = 0; i < 200; ++i) {
        const uint64_t begin = random() % expected_.size();
        const uint64_t end = begin + 1 + random() % (expected_.size() - begin);
        const absl::Span<const uint8_t> part = cast->Get(source_, begin, end);
        if (part.empty()) continue;  // another was at it
        ASSERT_EQ(std::memcmp(part.data(), expected_.data() + begin, part.size()), 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(budget_->used(), expected_.size());
}

TEST_F(CastCacheTest, IsSharedByTensorAndDTypeAndStaysInItsBudget) {
  {
    CastCache cache;
    const RefPtr<CastTensor> one = Find(cache, 1);
    EXPECT_EQ(Find(cache, 1), one);
    one->CacheDigest(7);
    EXPECT_EQ(Find(cache, 1)->CachedDigest(), 7u);
    const RefPtr<CastTensor> two = Find(cache, 2);
    EXPECT_NE(two, one);
    EXPECT_EQ(two->CachedDigest(), std::nullopt);
    EXPECT_FALSE(Find(cache, 3)) << "of 3 MB two are in use";
    EXPECT_FALSE(cache.Find(1, DType::kF32, DType::kF16, expected_.size(), *budget_));
    EXPECT_EQ(budget_->used(), 2 * expected_.size());
  }
  EXPECT_EQ(budget_->used(), 0u);
}

}  // namespace
}  // namespace modelstate
