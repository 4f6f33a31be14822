#include "server/device/buffer_pool.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "common/base/status.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;

struct SourceLog {
  std::multiset<size_t> live;
  int allocations = 0;
  size_t capacity = std::numeric_limits<size_t>::max();

  size_t live_bytes() const {
    size_t sum = 0;
    for (size_t bytes : live) sum += bytes;
    return sum;
  }
};

class LoggedSource : public MemorySource {
 public:
  explicit LoggedSource(SourceLog* log) : log_(log) {}
  void* Allocate(size_t bytes) override {
    if (bytes > log_->capacity - log_->live_bytes()) return nullptr;
    ++log_->allocations;
    log_->live.insert(bytes);
    return std::malloc(bytes);
  }
  void Free(void* ptr, size_t bytes) override {
    auto it = log_->live.find(bytes);
    ASSERT_NE(it, log_->live.end()) << "freed with another size";
    log_->live.erase(it);
    std::free(ptr);
  }

 private:
  SourceLog* const log_;
};

class BufferPoolTest : public ::testing::Test {
 protected:
  std::shared_ptr<BufferPool> Make(uint64_t limit) {
    return BufferPool::Create("cpu", std::make_unique<LoggedSource>(&log_), limit);
  }
  SourceLog log_;
};

TEST_F(BufferPoolTest, RecyclesExactlyEqualSizes) {
  std::shared_ptr<BufferPool> pool = Make(1000);
  DeviceBuffer first = *pool->Allocate(100);
  uint8_t* const address = first.data();
  first = DeviceBuffer();
  EXPECT_EQ(pool->usage().used_bytes, 0u);
  EXPECT_EQ(pool->usage().pooled_bytes, 100u);
  DeviceBuffer other = *pool->Allocate(99);
  EXPECT_EQ(log_.allocations, 2);
  DeviceBuffer again = *pool->Allocate(100);
  EXPECT_EQ(again.data(), address);
  EXPECT_EQ(log_.allocations, 2);
  EXPECT_EQ(pool->usage().used_bytes, 199u);
  EXPECT_EQ(pool->usage().pooled_bytes, 0u);
}

TEST_F(BufferPoolTest, MovedFromBufferIsEmpty) {
  std::shared_ptr<BufferPool> pool = Make(1000);
  DeviceBuffer a = *pool->Allocate(10);
  DeviceBuffer b = std::move(a);
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(a.size(), 0u);
  a = std::move(b);
  EXPECT_EQ(a.size(), 10u);
  EXPECT_EQ(pool->usage().used_bytes, 10u);
}

TEST_F(BufferPoolTest, LimitIsEnforcedWithARetryHint) {
  std::shared_ptr<BufferPool> pool = Make(100);
  DeviceBuffer held = *pool->Allocate(60);
  for (size_t bytes : {size_t{41}, std::numeric_limits<size_t>::max()}) {
    const absl::Status error = pool->Allocate(bytes).status();
    EXPECT_EQ(GetReason(error), Reason::kDeviceMemory);
    EXPECT_TRUE(GetRetryAfter(error).has_value());
    EXPECT_EQ(GetErrorMetadata(error)["limit_bytes"], "100");
    EXPECT_THAT(std::string(error.message()), HasSubstr("60 of its 100 bytes are in use"));
  }
  EXPECT_TRUE(pool->Allocate(40).ok());
}

TEST_F(BufferPoolTest, FreeBuffersMakeRoomForANewSize) {
  std::shared_ptr<BufferPool> pool = Make(100);
  { DeviceBuffer a = *pool->Allocate(80); }
  EXPECT_EQ(pool->usage().pooled_bytes, 80u);
  DeviceBuffer b = *pool->Allocate(30);
  EXPECT_EQ(pool->usage().pooled_bytes, 0u);
  EXPECT_EQ(log_.live, (std::multiset<size_t>{30}));
}

TEST_F(BufferPoolTest, FreeBuffersMakeRoomInAFullSource) {
  log_.capacity = 100;
  std::shared_ptr<BufferPool> pool = Make(1000);
  { DeviceBuffer a = *pool->Allocate(80); }
  EXPECT_TRUE(pool->Allocate(90).ok());
  EXPECT_EQ(GetReason(pool->Allocate(101).status()), Reason::kDeviceMemory);
}

TEST_F(BufferPoolTest, TrimGivesFreeBuffersBack) {
  std::shared_ptr<BufferPool> pool = Make(1000);
  DeviceBuffer held = *pool->Allocate(5);
  { DeviceBuffer a = *pool->Allocate(80); }
  pool->Trim();
  EXPECT_EQ(log_.live, (std::multiset<size_t>{5}));
  EXPECT_EQ(pool->usage().pooled_bytes, 0u);
  EXPECT_EQ(pool->usage().used_bytes, 5u);
}

TEST_F(BufferPoolTest, PoolLivesUntilItsLastBuffer) {
  std::shared_ptr<BufferPool> pool = Make(1000);
  DeviceBuffer held = *pool->Allocate(5);
  pool.reset();
  EXPECT_EQ(log_.live.size(), 1u);
  held = DeviceBuffer();
  EXPECT_TRUE(log_.live.empty());
}

TEST_F(BufferPoolTest, ManySmallBuffersShareSlabsOfHugePages) {
  constexpr size_t kBytes = 4000;
  constexpr size_t kCount = 12000;
  std::shared_ptr<BufferPool> pool = Make(kCount * kBytes);
  std::vector<DeviceBuffer> buffers;
  for (size_t i = 0; i < kCount; ++i) {
    buffers.push_back(*pool->Allocate(kBytes));
    std::memset(buffers.back().data(), static_cast<int>(i % 251), kBytes);
  }
  for (size_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(std::count(buffers[i].data(), buffers[i].data() + kBytes, i % 251), kBytes) << i;
  }
  EXPECT_LT(log_.allocations, 200);
  EXPECT_TRUE(log_.live.contains(size_t{2} << 20));
  EXPECT_LT(log_.live_bytes(), kCount * 4032 * 17 / 16);
  EXPECT_EQ(pool->usage().used_bytes, kCount * kBytes);
  EXPECT_EQ(GetReason(pool->Allocate(kBytes).status()), Reason::kDeviceMemory);
  buffers.clear();
  EXPECT_EQ(pool->usage().pooled_bytes, kCount * kBytes);
  pool->Trim();
  EXPECT_TRUE(log_.live.empty());
  EXPECT_EQ(pool->usage().pooled_bytes, 0u);
}

TEST_F(BufferPoolTest, ASlabIsGivenBackWhenAllOfItIsFree) {
  constexpr size_t kBytes = 64;
  std::shared_ptr<BufferPool> pool = Make(1 << 20);
  std::vector<DeviceBuffer> buffers;
  for (size_t i = 0; i < 100; ++i) buffers.push_back(*pool->Allocate(kBytes));
  // The first 32 have slabs of their own, the next two share one.
  DeviceBuffer held = std::move(buffers[32]);
  ASSERT_EQ(buffers[33].data(), held.data() + kBytes);
  uint8_t* const neighbour = buffers[33].data();
  buffers.clear();
  pool->Trim();
  EXPECT_EQ(log_.live, (std::multiset<size_t>{2 * kBytes}));
  EXPECT_EQ(pool->usage().used_bytes, kBytes);
  EXPECT_EQ(pool->usage().pooled_bytes, kBytes);
  EXPECT_EQ((*pool->Allocate(kBytes)).data(), neighbour);
  held = DeviceBuffer();
  pool->Trim();
  EXPECT_TRUE(log_.live.empty());
}

TEST_F(BufferPoolTest, WhatOnlyItsOwnSizeCanUseDoesNotRefuseOthers) {
  std::shared_ptr<BufferPool> pool = Make(100 * 64);
  std::vector<DeviceBuffer> buffers;
  for (size_t i = 0; i < 100; ++i) buffers.push_back(*pool->Allocate(64));
  DeviceBuffer held = std::move(buffers[32]);
  buffers.clear();
  EXPECT_TRUE(pool->Allocate(99 * 64).ok());
  EXPECT_FALSE(pool->Allocate(99 * 64 + 1).ok());
}

TEST_F(BufferPoolTest, HandsOutFirstWhatWasFreedFirst) {
  std::shared_ptr<BufferPool> pool = Make(1 << 20);
  std::vector<DeviceBuffer> buffers;
  std::vector<uint8_t*> addresses;
  for (size_t i = 0; i < 50; ++i) {
    buffers.push_back(*pool->Allocate(64));
    addresses.push_back(buffers.back().data());
  }
  for (DeviceBuffer& buffer : buffers) buffer = DeviceBuffer();
  for (size_t i = 0; i < 50; ++i) {
    buffers[i] = *pool->Allocate(64);
    EXPECT_EQ(buffers[i].data(), addresses[i]) << i;
  }
}

TEST_F(BufferPoolTest, TakesBackManyBuffersOfSeveralPoolsAndSizes) {
  std::shared_ptr<BufferPool> pool = Make(1000);
  SourceLog other_log;
  std::shared_ptr<BufferPool> other =
      BufferPool::Create("cpu:1", std::make_unique<LoggedSource>(&other_log), 1000);
  std::vector<DeviceBuffer> buffers;
  for (size_t bytes : {10, 20, 0, 20, 10}) buffers.push_back(*pool->Allocate(bytes));
  buffers.push_back(*other->Allocate(30));
  buffers.push_back(*pool->Allocate(10));
  BufferPool::ReturnAll(absl::MakeSpan(buffers));
  for (const DeviceBuffer& buffer : buffers) {
    EXPECT_EQ(buffer.data(), nullptr);
    EXPECT_EQ(buffer.size(), 0u);
  }
  EXPECT_EQ(pool->usage().used_bytes, 0u);
  EXPECT_EQ(pool->usage().pooled_bytes, 70u);
  EXPECT_EQ(other->usage().pooled_bytes, 30u);
  buffers.clear();  // nothing comes back twice
  EXPECT_EQ(pool->usage().pooled_bytes, 70u);
}

TEST_F(BufferPoolTest, ZeroBytesCostNothing) {
  std::shared_ptr<BufferPool> pool = Make(0);
  absl::StatusOr<DeviceBuffer> empty = pool->Allocate(0);
  ASSERT_TRUE(empty.ok());
  EXPECT_EQ(empty->data(), nullptr);
  EXPECT_EQ(log_.allocations, 0);
}

}  // namespace
}  // namespace modelstate
