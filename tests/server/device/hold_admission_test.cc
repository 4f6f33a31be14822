#include "server/device/hold_admission.h"

#include <gtest/gtest.h>

#include "server/device/cpu/cpu_device.h"

namespace modelstate {
namespace {

TEST(HoldAdmission, AdmitsUpToTheLimitAndNotAByteMore) {
  CpuDevice device(1000);
  const DeviceBuffer used = *device.pool()->Allocate(400);
  HoldAdmission::Account trained(device.holds());
  HoldAdmission::Account other(device.holds());
  EXPECT_FALSE(other.AdmitHeld(5000).has_value());  // nothing can step yet
  other.SetHeld(50);
  trained.Set(100, {200, 30});
  EXPECT_EQ(device.holds()->promised_bytes(), 180u);
  // 400 + 50 + 30 + 320 + 200
  EXPECT_FALSE(trained.AdmitHeld(320).has_value());
  const auto refusal = trained.AdmitHeld(321);
  ASSERT_TRUE(refusal.has_value());
  EXPECT_EQ(refusal->used_bytes, 400u);
  EXPECT_EQ(refusal->promised_bytes, 401u);
  EXPECT_EQ(refusal->step_bytes, 200u);
  EXPECT_EQ(refusal->limit_bytes, 1000u);
  EXPECT_TRUE(other.AdmitHeld(51).has_value());  // for the step of the first
  EXPECT_EQ(device.holds()->promised_bytes(), 400u);
  EXPECT_FALSE(other.AdmitHeld(50).has_value());
  EXPECT_FALSE(other.AdmitHeld(20).has_value());
  EXPECT_FALSE(trained.AdmitHeld(350).has_value());
}

TEST(HoldAdmission, PooledMemoryIsRoom) {
  CpuDevice device(1000);
  { const DeviceBuffer pooled = *device.pool()->Allocate(900); }
  HoldAdmission::Account account(device.holds());
  account.Set(0, {100, 0});
  EXPECT_FALSE(account.AdmitHeld(900).has_value());
}

TEST(HoldAdmission, LargestStepCountsAndEndsWithItsModule) {
  CpuDevice device(1000);
  HoldAdmission::Account small(device.holds());
  small.Set(0, {100, 0});
  {
    HoldAdmission::Account large(device.holds());
    large.Set(0, {500, 200});
    EXPECT_TRUE(small.AdmitHeld(301).has_value());
    large.Set(0, {500, 0});
    EXPECT_FALSE(small.AdmitHeld(500).has_value());
    small.SetHeld(0);
    large.Set(200, {500, 0});
  }
  EXPECT_EQ(device.holds()->promised_bytes(), 0u);
  EXPECT_FALSE(small.AdmitHeld(900).has_value());
  EXPECT_TRUE(small.AdmitHeld(901).has_value());
}

}  // namespace
}  // namespace modelstate
