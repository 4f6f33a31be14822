#include "server/device/memory_budget.h"

#include <gmock/gmock.h>

#include <limits>
#include <optional>
#include <thread>
#include <vector>

namespace modelstate {
namespace {

using ::testing::HasSubstr;

std::shared_ptr<MemoryBudget> Make(uint64_t limit) {
  return std::make_shared<MemoryBudget>(Reason::kPushMemory, "memory for arriving pushes",
                                        "--push_memory_bytes", limit);
}

TEST(MemoryBudget, ReservationGivesItsBytesBack) {
  std::shared_ptr<MemoryBudget> budget = Make(100);
  {
    MemoryBudget::Reservation a = *budget->Reserve(60);
    MemoryBudget::Reservation b = std::move(a);
    EXPECT_EQ(a.bytes(), 0u);
    EXPECT_EQ(b.bytes(), 60u);
    EXPECT_EQ(budget->used(), 60u);
    b = *budget->Reserve(10);
    EXPECT_EQ(budget->used(), 10u);
  }
  EXPECT_EQ(budget->used(), 0u);
}

TEST(MemoryBudget, RefusesWithReasonFlagAndRetryHint) {
  std::shared_ptr<MemoryBudget> budget = Make(100);
  const MemoryBudget::Reservation held = *budget->Reserve(60);
  const absl::Status full = budget->Reserve(41).status();
  EXPECT_EQ(GetReason(full), Reason::kPushMemory);
  EXPECT_TRUE(GetRetryAfter(full).has_value());
  EXPECT_THAT(std::string(full.message()), HasSubstr("--push_memory_bytes"));
  EXPECT_TRUE(budget->Reserve(40).ok());
  // Nothing to wait for: it is larger than the whole budget.
  for (uint64_t bytes : {uint64_t{101}, std::numeric_limits<uint64_t>::max()}) {
    const absl::Status never = budget->Reserve(bytes).status();
    EXPECT_EQ(GetReason(never), Reason::kPushMemory);
    EXPECT_FALSE(GetRetryAfter(never).has_value());
  }
}

// Who asks a part that has just been given back looked at a configuration that has ended since.
TEST(MemoryBudget, APartOfWhichNothingIsSetAsideAnyMoreIsAskedForAgain) {
  std::shared_ptr<MemoryBudget> budget = Make(100);
  std::shared_ptr<MemoryBudget> part = Make(0);
  EXPECT_FALSE(GetRetryAfter(part->Reserve(1).status()).has_value()) << "no part of any";
  ASSERT_TRUE(part->SetAside(*budget, 50).ok());
  EXPECT_FALSE(GetRetryAfter(part->Reserve(51).status()).has_value());
  ASSERT_TRUE(part->SetAside(*budget, 0).ok());
  const absl::Status none = part->Reserve(1).status();
  EXPECT_EQ(GetReason(none), Reason::kPushMemory);
  EXPECT_TRUE(GetRetryAfter(none).has_value());
  EXPECT_THAT(std::string(none.message()), HasSubstr("try again"));
  EXPECT_EQ(budget->used(), 0u);
}

TEST(MemoryBudget, ReservationsMergeAndShrink) {
  std::shared_ptr<MemoryBudget> budget = Make(100);
  MemoryBudget::Reservation account;
  account.Merge(MemoryBudget::Reservation());
  account.Merge(*budget->Reserve(60));
  account.Merge(*budget->Reserve(30));
  EXPECT_EQ(account.bytes(), 90u);
  EXPECT_EQ(budget->used(), 90u);
  account.Shrink(80);
  EXPECT_EQ(account.bytes(), 10u);
  EXPECT_EQ(budget->used(), 10u);
  account.Shrink(10);
  EXPECT_EQ(budget->used(), 0u);
  account.Merge(*budget->Reserve(5));
  account.Release();
  EXPECT_EQ(budget->used(), 0u);
}

TEST(MemoryBudget, ReservationOutlivesTheOwnersReference) {
  std::optional<MemoryBudget::Reservation> reservation = *Make(10)->Reserve(5);
  reservation.reset();
}

TEST(MemoryBudget, NeverExceedsItsLimitUnderContention) {
  std::shared_ptr<MemoryBudget> budget = Make(10);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10000; ++i) {
        absl::StatusOr<MemoryBudget::Reservation> r = budget->Reserve(4);
        ASSERT_LE(budget->used(), 10u);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(budget->used(), 0u);
}

}  // namespace
}  // namespace modelstate
