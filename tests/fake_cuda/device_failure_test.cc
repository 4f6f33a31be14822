#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "common/base/status.h"
#include "server/device/device.h"
#include "tests/fake_cuda/fake_cuda.h"

namespace modelstate {
namespace {

constexpr size_t kBytes = (size_t{400} << 10) + 5;  // more than the slots of a small writer

// Many small buffers through one writer, and back by one read.
absl::Status UseSmallBuffers(Device& device) {
  std::vector<DeviceBuffer> buffers;
  std::vector<BufferRange> ranges;
  std::vector<uint8_t> all;
  for (size_t i = 0; i < 600; ++i) {
    MS_ASSIGN_OR_RETURN(buffers.emplace_back(), device.pool()->Allocate(1 + i % 3 * 7));
  }
  MS_ASSIGN_OR_RETURN(const auto writer, device.NewWriter(1000));
  for (size_t i = 0; i < buffers.size(); ++i) {
    const std::vector<uint8_t> bytes(buffers[i].size(), static_cast<uint8_t>(i * 31));
    writer->Write(bytes, buffers[i], 0);
    all.insert(all.end(), bytes.begin(), bytes.end());
    ranges.push_back({&buffers[i], 0, bytes.size()});
  }
  MS_RETURN_IF_ERROR(writer->Finish());
  MS_ASSIGN_OR_RETURN(const auto reader, device.NewReader(all.size()));
  MS_ASSIGN_OR_RETURN(const auto read, reader->Start(ranges));
  MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, read->Wait());
  EXPECT_TRUE(std::vector<uint8_t>(bytes.begin(), bytes.end()) == all);
  return absl::OkStatus();
}

// A device made, and one buffer filled, written and read back.
absl::Status UseDevice(std::vector<uint8_t>* out) {
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<Device> device, MakeDevice("cuda:0", 0));
  MS_ASSIGN_OR_RETURN(DeviceBuffer buffer, device->pool()->Allocate(kBytes));
  MS_RETURN_IF_ERROR(device->FillZero(buffer));
  MS_ASSIGN_OR_RETURN(const auto writer, device->NewWriter(1));
  writer->Write(std::vector<uint8_t>(kBytes, 7), buffer, 0);
  MS_RETURN_IF_ERROR(writer->Finish());
  MS_RETURN_IF_ERROR(UseSmallBuffers(*device));
  out->assign(kBytes, 0);
  return device->CopyToHost(buffer, 0, absl::MakeSpan(*out));
}

class DeviceFailureTest : public ::testing::Test {
 protected:
  void TearDown() override { FakeCudaFail(0, cudaSuccess, false); }
};

// The fake ends the program where memory goes that a copy still needs.
TEST_F(DeviceFailureTest, AFailureOfAnyCallIsAnErrorOrHarmlessAndNothingIsLeftUnderWay) {
  std::vector<uint8_t> out;
  FakeCudaFail(0, cudaSuccess, false);
  ASSERT_TRUE(UseDevice(&out).ok());
  const uint64_t calls = FakeCudaCalls();
  ASSERT_GT(calls, 20u);
  uint64_t failed = 0;
  for (const cudaError_t error : {cudaErrorMemoryAllocation, cudaErrorLaunchFailure}) {
    for (uint64_t call = 1; call <= calls; ++call) {
      FakeCudaFail(call, error, false);
      // What only waits for what is done already, when the device ends, has nobody to tell.
      const absl::Status status = UseDevice(&out);
      EXPECT_TRUE(!status.ok() || out == std::vector<uint8_t>(kBytes, 7)) << "call " << call;
      failed += !status.ok();
      FakeCudaFail(0, cudaSuccess, false);
      ASSERT_TRUE(UseDevice(&out).ok()) << "after call " << call;
      EXPECT_TRUE(out == std::vector<uint8_t>(kBytes, 7));
    }
  }
  EXPECT_GT(failed, calls);  // more than half of 2 * calls
}

TEST_F(DeviceFailureTest, AStickyErrorStaysAnError) {
  std::vector<uint8_t> out;
  FakeCudaFail(0, cudaSuccess, false);
  ASSERT_TRUE(UseDevice(&out).ok());
  const uint64_t calls = FakeCudaCalls();
  FakeCudaFail(calls / 2, cudaErrorIllegalAddress, true);
  EXPECT_FALSE(UseDevice(&out).ok());
  EXPECT_FALSE(UseDevice(&out).ok());
}

TEST_F(DeviceFailureTest, AGpuWithoutMemoryIsDeviceMemory) {
  FakeCudaFail(0, cudaSuccess, false);
  const auto device = MakeDevice("cuda:0", 0);
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ((*device)->pool()->usage().limit_bytes, (size_t{1} << 30) / 4 * 3);
  FakeCudaFail(1, cudaErrorMemoryAllocation, false);
  EXPECT_EQ(GetReason((*device)->pool()->Allocate(kBytes).status()), Reason::kDeviceMemory);
  EXPECT_EQ((*device)->pool()->usage().used_bytes, 0u);
  EXPECT_TRUE((*device)->pool()->Allocate(kBytes).ok());
}

TEST(CudaDeviceCopies, AreRightInAnyOrder) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    FakeCudaSeed(seed);
    std::vector<uint8_t> out;
    const absl::Status status = UseDevice(&out);
    ASSERT_TRUE(status.ok()) << status << ", seed " << seed;
    ASSERT_TRUE(out == std::vector<uint8_t>(kBytes, 7)) << "seed " << seed;
  }
}

TEST(CudaDeviceCopies, ArePinned) {
  const uint64_t before = FakeCudaPageableCopies();
  std::vector<uint8_t> out;
  ASSERT_TRUE(UseDevice(&out).ok());
  EXPECT_EQ(FakeCudaPageableCopies(), before);
}

}  // namespace
}  // namespace modelstate
