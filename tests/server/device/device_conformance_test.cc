#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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

// Sizes and places as a module of many small tensors has them, of all alignments.
TEST_P(DeviceConformance, AWriterFillsManyBuffersAndAReaderGathersThem) {
  constexpr size_t kBuffers = 3000;
  std::vector<DeviceBuffer> buffers;
  std::vector<uint8_t> all;
  std::vector<BufferRange> ranges;
  for (size_t i = 0; i < kBuffers; ++i) buffers.push_back(Buffer(1 + i % 301));
  const auto writer = device_->NewWriter(kBuffers * 151);
  ASSERT_TRUE(writer.ok()) << writer.status();
  for (uint32_t round = 0; round < 2; ++round) {
    all.clear();
    ranges.clear();
    for (uint32_t i = 0; i < kBuffers; ++i) {
      const std::vector<uint8_t> bytes = Pattern(buffers[i].size(), i + round);
      (*writer)->Write(bytes, buffers[i], 0);
      // Some only in part.
      const size_t from = i % 7 == 0 ? i % buffers[i].size() : 0;
      all.insert(all.end(), bytes.begin() + static_cast<int64_t>(from), bytes.end());
      ranges.push_back({&buffers[i], from, bytes.size() - from});
    }
    ASSERT_TRUE((*writer)->Finish().ok());
    const auto reader = device_->NewReader(all.size());
    ASSERT_TRUE(reader.ok()) << reader.status();
    const auto read = (*reader)->Start(ranges);
    ASSERT_TRUE(read.ok()) << read.status();
    const auto bytes = (*read)->Wait();
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    ASSERT_TRUE(std::vector<uint8_t>(bytes->begin(), bytes->end()) == all) << "round " << round;
  }
}

TEST_P(DeviceConformance, PiecesOfAWriterMayBeFilledInAnyLengthThatItGives) {
  DeviceBuffer buffer = Buffer(kLong);
  const std::vector<uint8_t> in = Pattern(kLong, 4);
  const auto writer = device_->NewWriter(kLong);
  ASSERT_TRUE(writer.ok()) << writer.status();
  for (size_t at = 0, step = 0; at < kLong; ++step) {
    const size_t want = std::min<size_t>(kLong - at, 1 + step * 7919 % 100000);
    const absl::Span<uint8_t> to = (*writer)->Reserve(buffer, at, want);
    ASSERT_FALSE(to.empty());
    ASSERT_LE(to.size(), want);
    std::memcpy(to.data(), in.data() + at, to.size());
    at += to.size();
  }
  ASSERT_TRUE((*writer)->Finish().ok());
  EXPECT_TRUE(Read(buffer, 0, kLong) == in);
}

TEST_P(DeviceConformance, ReadsRunAheadAndOutliveTheirReader) {
  constexpr size_t kBlock = size_t{1} << 20;
  DeviceBuffer buffer = Buffer(4 * kBlock);
  const std::vector<uint8_t> in = Pattern(4 * kBlock, 5);
  ASSERT_TRUE(device_->CopyFromHost(in, buffer, 0).ok());
  std::vector<std::shared_ptr<HostRead>> reads;
  {
    const auto reader = device_->NewReader(kBlock);
    ASSERT_TRUE(reader.ok()) << reader.status();
    for (size_t i = 0; i < 4; ++i) {
      const BufferRange range = {&buffer, i * kBlock, kBlock};
      const auto read = (*reader)->Start({&range, 1});
      ASSERT_TRUE(read.ok()) << read.status();
      reads.push_back(*read);
    }
  }
  for (size_t i = 4; i-- > 0;) {
    const auto bytes = reads[i]->Wait();
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_EQ(std::memcmp(bytes->data(), in.data() + i * kBlock, kBlock), 0) << i;
  }
}

// The fake ends the program where memory goes that something under way still uses.
TEST_P(DeviceConformance, WhatIsDroppedHalfwayLeavesNothingUnderWay) {
  constexpr size_t kBlock = size_t{256} << 10;
  for (int round = 0; round < 10; ++round) {
    DeviceBuffer buffer = Buffer(4 * kBlock);
    const auto reader = device_->NewReader(kBlock);
    ASSERT_TRUE(reader.ok()) << reader.status();
    for (size_t i = 0; i < 4; ++i) {
      const BufferRange range = {&buffer, i * kBlock, kBlock};
      ASSERT_TRUE((*reader)->Start({&range, 1}).ok());
    }
    buffer = DeviceBuffer();
    device_->pool()->Trim();
  }
  for (int round = 0; round < 10; ++round) {
    DeviceBuffer buffer = Buffer(4 * kBlock);
    {
      const auto writer = device_->NewWriter(kBlock);
      ASSERT_TRUE(writer.ok()) << writer.status();
      (*writer)->Write(Pattern(4 * kBlock, 6), buffer, 0);
    }
    buffer = DeviceBuffer();
    device_->pool()->Trim();
  }
  EXPECT_EQ(device_->pool()->usage().pooled_bytes, 0U);
}

TEST_P(DeviceConformance, IsHealthyAndStaysSoAfterAWantOfMemory) {
  EXPECT_TRUE(device_->health().ok());
  EXPECT_FALSE(device_->pool()->Allocate(size_t{1} << 40).ok());
  EXPECT_EQ(device_->Note(absl::ResourceExhaustedError("x")).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(device_->health().ok());
}

TEST_P(DeviceConformance, AnInternalErrorIsItsEndAndIsToldOnce) {
  int told = 0;
  device_->OnFailure([&](Device& failed) {
    EXPECT_EQ(&failed, device_.get());
    ++told;
  });
  EXPECT_EQ(device_->Note(absl::InternalError("first")).message(), "first");
  EXPECT_EQ(device_->Note(absl::InternalError("second")).message(), "second");
  EXPECT_EQ(device_->health().message(), "first");
  EXPECT_EQ(told, 1);
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
