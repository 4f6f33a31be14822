#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "common/base/status.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_status.h"
#include "server/device/cuda/cuda_stream.h"

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

}  // namespace
}  // namespace modelstate
