#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/base/status.h"
#include "server/device/device.h"

namespace modelstate {
namespace {

// Longer than all pinned chunks of a GPU together, and no multiple of one.
constexpr size_t kLong = (size_t{20} << 20) + 77;

std::vector<uint8_t> Pattern(size_t bytes, uint32_t seed) {
  std::vector<uint8_t> pattern(bytes);
  for (size_t i = 0; i < bytes; ++i)
    pattern[i] = static_cast<uint8_t>((i + seed) * 2654435761 >> 13);
  return pattern;
}

// What every kind of device does.
class DeviceConformance : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Device>> device = MakeDevice(GetParam(), size_t{64} << 20);
    if (device.status().code() == absl::StatusCode::kFailedPrecondition) {
      GTEST_SKIP() << device.status().message();
    }
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
  }

  DeviceBuffer Buffer(size_t bytes) {
    absl::StatusOr<DeviceBuffer> buffer = device_->pool()->Allocate(bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    return buffer.ok() ? *std::move(buffer) : DeviceBuffer();
  }

  std::vector<uint8_t> Read(const DeviceBuffer& buffer, uint64_t offset, size_t bytes) {
    std::vector<uint8_t> out(bytes);
    const absl::Status status = device_->CopyToHost(buffer, offset, absl::MakeSpan(out));
    EXPECT_TRUE(status.ok()) << status;
    return out;
  }

  std::unique_ptr<Device> device_;
};

TEST_P(DeviceConformance, HasTheNameThatItWasAskedForBy) { EXPECT_EQ(device_->name(), GetParam()); }

TEST_P(DeviceConformance, CopiesBothWaysInsideTheBuffer) {
  DeviceBuffer buffer = Buffer(8);
  ASSERT_TRUE(device_->FillZero(buffer).ok());
  const std::vector<uint8_t> in = {1, 2, 3};
  ASSERT_TRUE(device_->CopyFromHost(in, buffer, 5).ok());
  EXPECT_EQ(Read(buffer, 4, 4), (std::vector<uint8_t>{0, 1, 2, 3}));
}

TEST_P(DeviceConformance, RefusesCopiesThatLeaveTheBuffer) {
  DeviceBuffer buffer = Buffer(8);
  std::vector<uint8_t> bytes(3);
  EXPECT_FALSE(device_->CopyFromHost(bytes, buffer, 6).ok());
  EXPECT_FALSE(device_->CopyToHost(buffer, 6, absl::MakeSpan(bytes)).ok());
  EXPECT_FALSE(device_->CopyFromHost(bytes, buffer, ~uint64_t{0}).ok());
  EXPECT_FALSE(device_->CopyToHost(buffer, ~uint64_t{0}, absl::MakeSpan(bytes)).ok());
}

TEST_P(DeviceConformance, CopiesWhatIsLongerThanItsChunks) {
  DeviceBuffer buffer = Buffer(kLong);
  const std::vector<uint8_t> in = Pattern(kLong, 1);
  ASSERT_TRUE(device_->CopyFromHost(in, buffer, 0).ok());
  EXPECT_TRUE(Read(buffer, 0, kLong) == in);
  const std::vector<uint8_t> part = Pattern(kLong / 2, 2);
  ASSERT_TRUE(device_->CopyFromHost(part, buffer, 13).ok());
  EXPECT_TRUE(Read(buffer, 13, part.size()) == part);
  EXPECT_EQ(Read(buffer, 0, 13), std::vector<uint8_t>(in.begin(), in.begin() + 13));
  const size_t end = 13 + part.size();
  EXPECT_TRUE(Read(buffer, end, kLong - end) ==
              std::vector<uint8_t>(in.begin() + static_cast<int64_t>(end), in.end()));
}

TEST_P(DeviceConformance, ACopyIsCompleteWhenItReturns) {
  DeviceBuffer buffer = Buffer(1 << 20);
  std::vector<uint8_t> in = Pattern(1 << 20, 3);
  const std::vector<uint8_t> kept = in;
  ASSERT_TRUE(device_->CopyFromHost(in, buffer, 0).ok());
  in.assign(in.size(), 0);
  EXPECT_TRUE(Read(buffer, 0, kept.size()) == kept);
  // Into memory that another buffer had: nothing of the former is still under way.
  buffer = DeviceBuffer();
  DeviceBuffer again = Buffer(1 << 20);
  ASSERT_TRUE(device_->FillZero(again).ok());
  EXPECT_TRUE(Read(again, 0, kept.size()) == std::vector<uint8_t>(kept.size(), 0));
}

TEST_P(DeviceConformance, EmptyBuffersAreFilledAndCopied) {
  DeviceBuffer buffer = Buffer(0);
  EXPECT_TRUE(device_->FillZero(buffer).ok());
  EXPECT_TRUE(device_->CopyFromHost({}, buffer, 0).ok());
  EXPECT_TRUE(Read(buffer, 0, 0).empty());
}

TEST_P(DeviceConformance, BuffersOfASlabAreApart) {
  std::vector<DeviceBuffer> buffers;
  for (uint8_t i = 0; i < 100; ++i) {
    buffers.push_back(Buffer(100));
    ASSERT_TRUE(device_->CopyFromHost(std::vector<uint8_t>(100, i), buffers.back(), 0).ok());
  }
  for (uint8_t i = 0; i < 100; ++i) {
    EXPECT_EQ(Read(buffers[i], 0, 100), std::vector<uint8_t>(100, i)) << int{i};
  }
}

TEST_P(DeviceConformance, MoreThanTheLimitIsDeviceMemoryAndChangesNothing) {
  DeviceBuffer half = Buffer(size_t{32} << 20);
  const absl::Status status = device_->pool()->Allocate((size_t{32} << 20) + 1).status();
  EXPECT_EQ(GetReason(status), Reason::kDeviceMemory) << status;
  EXPECT_NE(status.message().find(GetParam()), absl::string_view::npos) << status;
  EXPECT_EQ(device_->pool()->usage().used_bytes, size_t{32} << 20);
  EXPECT_EQ(Buffer(size_t{32} << 20).size(), size_t{32} << 20);
}

INSTANTIATE_TEST_SUITE_P(Devices, DeviceConformance, ::testing::Values("cpu", "cuda:0"),
                         [](const auto& info) {
                           return std::string(info.param) == "cpu" ? "Cpu" : "Cuda";
                         });

}  // namespace
}  // namespace modelstate
