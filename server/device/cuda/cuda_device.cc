#include "server/device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/device/accelerator.h"
#include "server/device/copy_range.h"
#include "server/device/cuda/cuda_memory_source.h"
#include "server/device/cuda/cuda_status.h"

namespace modelstate {
namespace {

// Of each direction. Chunks of this size reach 0.97 of one large copy.
constexpr uint64_t kChunkBytes = uint64_t{4} << 20;
constexpr size_t kChunks = 4;

// After an error too: nothing may still write to the buffer, which its owner may free.
absl::Status WaitForLane(const CudaStream& stream, absl::Status status) {
  status.Update(stream.Synchronize());
  if (!status.ok()) (void)stream.Synchronize();
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Create(uint32_t index,
                                                               uint64_t memory_limit_bytes) {
  const std::string name = absl::StrCat("cuda:", index);
  const int count = CudaDeviceCount();
  if (index >= static_cast<uint32_t>(count)) {
    return absl::FailedPreconditionError(
        absl::StrCat("device ", name, ": there is no GPU of this number, the NVIDIA driver shows ",
                     count, "; check nvidia-smi and CUDA_VISIBLE_DEVICES, or choose cpu or auto"));
  }
  if (memory_limit_bytes == 0) {
    CudaDeviceGuard guard(static_cast<int>(index));
    MS_RETURN_IF_ERROR(guard.status());
    size_t free = 0;
    size_t total = 0;
    MS_RETURN_IF_ERROR(
        CudaStatus(cudaMemGetInfo(&free, &total), absl::StrCat("ask for the memory of ", name)));
    memory_limit_bytes = total / 4 * 3;
  }
  MS_ASSIGN_OR_RETURN(std::unique_ptr<Lane> up, MakeLane(static_cast<int>(index)));
  MS_ASSIGN_OR_RETURN(std::unique_ptr<Lane> down, MakeLane(static_cast<int>(index)));
  return std::unique_ptr<CudaDevice>(new CudaDevice(
      static_cast<int>(index), name, memory_limit_bytes, std::move(up), std::move(down)));
}

absl::StatusOr<std::unique_ptr<CudaDevice::Lane>> CudaDevice::MakeLane(int index) {
  MS_ASSIGN_OR_RETURN(CudaStream made, CudaStream::Create(index));
  auto stream = std::make_unique<CudaStream>(std::move(made));
  MS_ASSIGN_OR_RETURN(StagingRing ring, StagingRing::Create(*stream, kChunkBytes, kChunks));
  return std::make_unique<Lane>(std::move(stream), std::move(ring));
}

CudaDevice::CudaDevice(int index, std::string name, uint64_t memory_limit_bytes,
                       std::unique_ptr<Lane> up, std::unique_ptr<Lane> down)
    : Device(
          BufferPool::Create(name, std::make_unique<CudaMemorySource>(index), memory_limit_bytes)),
      name_(std::move(name)),
      up_(std::move(up)),
      down_(std::move(down)) {}

absl::Status CudaDevice::CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst,
                                      uint64_t offset) {
  MS_RETURN_IF_ERROR(CheckCopyRange(offset, src.size(), dst.size()));
  if (src.empty()) return absl::OkStatus();
  absl::MutexLock lock(&up_->mutex);
  absl::Status status = up_->ring.Upload(
      dst.data() + offset, src.size(), [&](uint64_t from, absl::Span<uint8_t> chunk) {
        std::memcpy(chunk.data(), src.data() + from, chunk.size());
        return absl::OkStatus();
      });
  return WaitForLane(*up_->stream, std::move(status));
}

absl::Status CudaDevice::CopyToHost(const DeviceBuffer& src, uint64_t offset,
                                    absl::Span<uint8_t> dst) {
  MS_RETURN_IF_ERROR(CheckCopyRange(offset, dst.size(), src.size()));
  if (dst.empty()) return absl::OkStatus();
  absl::MutexLock lock(&down_->mutex);
  return down_->ring.Download(src.data() + offset, dst.size(),
                              [&](uint64_t from, absl::Span<const uint8_t> chunk) {
                                std::memcpy(dst.data() + from, chunk.data(), chunk.size());
                                return absl::OkStatus();
                              });
}

absl::Status CudaDevice::FillZero(DeviceBuffer& dst) {
  if (dst.size() == 0) return absl::OkStatus();
  absl::MutexLock lock(&up_->mutex);
  absl::Status status =
      CudaStatus(cudaMemsetAsync(dst.data(), 0, dst.size(), up_->stream->handle()),
                 absl::StrCat("fill ", dst.size(), " bytes on ", name_));
  return WaitForLane(*up_->stream, std::move(status));
}

absl::StatusOr<std::unique_ptr<Device>> MakeGpuDevice(uint32_t index, uint64_t memory_limit_bytes) {
  return CudaDevice::Create(index, memory_limit_bytes);
}

}  // namespace modelstate
