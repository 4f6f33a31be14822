#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "common/base/status.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_status.h"
#include "server/device/cuda/cuda_stream.h"
#include "server/device/cuda/staging_ring.h"

namespace modelstate {
namespace {

TEST(CudaStatusTest, MemoryThatIsNotThereIsDeviceMemory) {
  const absl::Status status = CudaStatus(cudaErrorMemoryAllocation, "allocate 5 bytes on cuda:0");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(GetReason(status), Reason::kDeviceMemory);
  EXPECT_NE(status.message().find("allocate 5 bytes on cuda:0"), absl::string_view::npos);
}

TEST(CudaStatusTest, OtherErrorsKeepCudasName) {
  EXPECT_TRUE(CudaStatus(cudaSuccess, "x").ok());
  const absl::Status status = CudaStatus(cudaErrorIllegalAddress, "copy");
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("cudaErrorIllegalAddress"), absl::string_view::npos);
  EXPECT_EQ(CudaStatus(cudaErrorNoDevice, "x").code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CudaStatusTest, WithoutADeviceEverythingIsAnErrorNotACrash) {
  const bool there = CudaDeviceCount() > 0;
  EXPECT_EQ(CudaStream::Create(0).ok(), there);
  EXPECT_EQ(CudaMemory::Allocate(0, 16).ok(), there);
  EXPECT_EQ(PinnedMemory::Allocate(16).ok(), there);
}

class CudaDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "no CUDA device";
    absl::StatusOr<CudaStream> stream = CudaStream::Create(0);
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_.emplace(*std::move(stream));
  }

  CudaMemory Memory(uint64_t bytes) {
    absl::StatusOr<CudaMemory> memory = CudaMemory::Allocate(0, bytes);
    EXPECT_TRUE(memory.ok()) << memory.status();
    return memory.ok() ? *std::move(memory) : CudaMemory();
  }

  std::optional<CudaStream> stream_;
};

TEST_F(CudaDeviceTest, TooMuchMemoryIsAnErrorAndLaterAllocationsSucceed) {
  const absl::Status status = CudaMemory::Allocate(0, uint64_t{1} << 50).status();
  EXPECT_EQ(GetReason(status), Reason::kDeviceMemory) << status;
  EXPECT_NE(Memory(1 << 20).data(), nullptr);
}

TEST_F(CudaDeviceTest, ADeviceThatIsNotThereIsAnError) {
  CudaDeviceGuard guard(CudaDeviceCount());
  EXPECT_FALSE(guard.status().ok());
  EXPECT_TRUE(stream_->Synchronize().ok());
}

TEST_F(CudaDeviceTest, AnEventPassesWhenTheStreamHas) {
  absl::StatusOr<CudaEvent> event = CudaEvent::Create(0);
  ASSERT_TRUE(event.ok()) << event.status();
  const CudaMemory memory = Memory(64 << 20);
  ASSERT_EQ(cudaMemsetAsync(memory.data(), 7, memory.size(), stream_->handle()), cudaSuccess);
  ASSERT_TRUE(event->Record(*stream_).ok());
  ASSERT_TRUE(event->Synchronize().ok());
  const absl::StatusOr<bool> passed = event->Passed();
  ASSERT_TRUE(passed.ok()) << passed.status();
  EXPECT_TRUE(*passed);
}

TEST_F(CudaDeviceTest, AnotherStreamThatWaitsForAnEventSeesWhatCameBefore) {
  absl::StatusOr<CudaStream> other = CudaStream::Create(0);
  absl::StatusOr<CudaEvent> event = CudaEvent::Create(0);
  ASSERT_TRUE(other.ok() && event.ok());
  const CudaMemory memory = Memory(256 << 20);
  absl::StatusOr<PinnedMemory> last = PinnedMemory::Allocate(1);
  ASSERT_TRUE(last.ok()) << last.status();
  for (const int value : {1, 2, 3}) {
    ASSERT_EQ(cudaMemsetAsync(memory.data(), value, memory.size(), stream_->handle()), cudaSuccess);
    ASSERT_TRUE(event->Record(*stream_).ok());
    ASSERT_TRUE(other->WaitFor(*event).ok());
    ASSERT_EQ(cudaMemcpyAsync(last->data(), memory.data() + memory.size() - 1, 1,
                              cudaMemcpyDeviceToHost, other->handle()),
              cudaSuccess);
    ASSERT_TRUE(other->Synchronize().ok());
    EXPECT_EQ(*last->data(), value);
  }
}

using StagingRingTest = CudaDeviceTest;

std::vector<uint8_t> Pattern(uint64_t bytes, uint32_t seed) {
  std::vector<uint8_t> pattern(bytes);
  for (uint8_t& byte : pattern)
    byte = static_cast<uint8_t>((seed = seed * 1664525 + 1013904223) >> 24);
  return pattern;
}

absl::Status Upload(StagingRing& ring, const std::vector<uint8_t>& from, uint8_t* to) {
  return ring.Upload(to, from.size(), [&](uint64_t offset, absl::Span<uint8_t> chunk) {
    std::memcpy(chunk.data(), from.data() + offset, chunk.size());
    return absl::OkStatus();
  });
}

absl::Status Download(StagingRing& ring, const uint8_t* from, std::vector<uint8_t>* to) {
  uint64_t expected = 0;
  return ring.Download(from, to->size(), [&](uint64_t offset, absl::Span<const uint8_t> chunk) {
    EXPECT_EQ(offset, expected);
    expected += chunk.size();
    std::memcpy(to->data() + offset, chunk.data(), chunk.size());
    return absl::OkStatus();
  });
}

TEST_F(StagingRingTest, BytesOfAnySizeArriveBothWays) {
  for (const uint64_t chunk : {1, 4099, 65536}) {
    for (const size_t chunks : {1, 2, 5}) {
      absl::StatusOr<StagingRing> ring = StagingRing::Create(*stream_, chunk, chunks);
      ASSERT_TRUE(ring.ok()) << ring.status();
      for (const uint64_t bytes : {uint64_t{0}, uint64_t{1}, chunk - 1, chunk, chunk + 1,
                                   chunks * chunk, 7 * chunks * chunk + 13}) {
        const CudaMemory memory = Memory(bytes + 1);
        for (uint32_t round = 0; round < 3; ++round) {
          SCOPED_TRACE(::testing::Message() << bytes << " bytes in " << chunks << " of " << chunk);
          const std::vector<uint8_t> sent = Pattern(bytes, round);
          std::vector<uint8_t> received(bytes);
          // Off its start too. The download comes after the upload in the stream.
          ASSERT_TRUE(Upload(*ring, sent, memory.data() + round % 2).ok());
          ASSERT_TRUE(Download(*ring, memory.data() + round % 2, &received).ok());
          ASSERT_TRUE(sent == received);
        }
      }
    }
  }
}

TEST_F(StagingRingTest, AnErrorOfTheCallbackEndsTheTransferAndTheRingGoesOn) {
  absl::StatusOr<StagingRing> ring = StagingRing::Create(*stream_, 1000, 3);
  ASSERT_TRUE(ring.ok()) << ring.status();
  const CudaMemory memory = Memory(10000);
  int calls = 0;
  const auto fail = [&](uint64_t, auto) {
    return ++calls == 5 ? absl::DataLossError("fifth") : absl::OkStatus();
  };
  EXPECT_EQ(ring->Upload(memory.data(), 10000, fail).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(calls, 5);
  calls = 0;
  EXPECT_EQ(ring->Download(memory.data(), 10000, fail).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(calls, 5);
  const std::vector<uint8_t> sent = Pattern(10000, 1);
  std::vector<uint8_t> received(10000);
  ASSERT_TRUE(Upload(*ring, sent, memory.data()).ok());
  ASSERT_TRUE(Download(*ring, memory.data(), &received).ok());
  EXPECT_TRUE(sent == received);
}

TEST_F(StagingRingTest, AChunkIsNotFilledWhileItsCopyIsUnderWay) {
  // Behind a long queue, copies are late: a ring that did not wait would overwrite them.
  absl::StatusOr<StagingRing> ring = StagingRing::Create(*stream_, 1 << 20, 2);
  ASSERT_TRUE(ring.ok()) << ring.status();
  const CudaMemory busy = Memory(512 << 20);
  const CudaMemory memory = Memory(16 << 20);
  for (int i = 0; i < 50; ++i) {
    ASSERT_EQ(cudaMemsetAsync(busy.data(), i, busy.size(), stream_->handle()), cudaSuccess);
  }
  const std::vector<uint8_t> sent = Pattern(16 << 20, 9);
  std::vector<uint8_t> received(16 << 20);
  ASSERT_TRUE(Upload(*ring, sent, memory.data()).ok());
  ASSERT_TRUE(Download(*ring, memory.data(), &received).ok());
  EXPECT_TRUE(sent == received);
}

}  // namespace
}  // namespace modelstate
