#include "server/device/compute_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "absl/synchronization/barrier.h"

namespace modelstate {
namespace {

TEST(ComputePool, CallsEachIndexOnce) {
  for (size_t threads : {1, 2, 7}) {
    ComputePool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (size_t count : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> calls(count);
      pool.ParallelFor(count, [&](size_t i) { ++calls[i]; });
      for (const std::atomic<int>& n : calls) EXPECT_EQ(n, 1);
    }
  }
}

TEST(ComputePool, ZeroIsOnePerHardwareThread) {
  EXPECT_EQ(ComputePool(0).threads(), std::max(1u, std::thread::hardware_concurrency()));
}

TEST(ComputePool, ThreadsWorkBesideTheCaller) {
  ComputePool pool(3);
  // Each task waits for the others: it ends only when three threads are in it at once.
  absl::Barrier* const barrier = new absl::Barrier(3);
  pool.ParallelFor(3, [&](size_t) {
    if (barrier->Block()) delete barrier;
  });
}

TEST(ComputePool, SeveralCallersShareTheThreads) {
  ComputePool pool(4);
  std::vector<std::thread> callers;
  std::atomic<uint64_t> sum{0};
  for (int c = 0; c < 6; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<uint64_t> mine{0};
        pool.ParallelFor(50, [&](size_t i) { mine += i; });
        ASSERT_EQ(mine, 1225u) << "ParallelFor returned before all was done";
        sum += mine;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 6u * 200u * 1225u);
}

TEST(ComputePool, CallMayNest) {
  ComputePool pool(2);
  std::atomic<int> calls{0};
  pool.ParallelFor(4, [&](size_t) { pool.ParallelFor(4, [&](size_t) { ++calls; }); });
  EXPECT_EQ(calls, 16);
}

}  // namespace
}  // namespace modelstate
