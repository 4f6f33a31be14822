#include "server/device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/device/accelerator.h"
#include "server/device/cpu/host_memory_source.h"
#include "server/device/cuda/cuda_memory_source.h"
#include "server/device/cuda/cuda_reader.h"
#include "server/device/cuda/cuda_status.h"
#include "server/device/cuda/cuda_writer.h"

namespace modelstate {
namespace {

// Of pinned memory, of each GPU: what many transfers at once need, and no more of the host's memory
// than others can spare.
uint64_t DefaultStagingLimit() {
  return std::clamp<uint64_t>(HostMemoryBytes() / 32, uint64_t{128} << 20, uint64_t{4} << 30);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Create(uint32_t index,
                                                               uint64_t memory_limit_bytes,
                                                               uint64_t staging_limit_bytes) {
  const std::string name = absl::StrCat("cuda:", index);
  const int count = CudaDeviceCount();
  if (index >= static_cast<uint32_t>(count)) {
    return absl::FailedPreconditionError(
        absl::StrCat("device ", name, ": there is no GPU of this number, the NVIDIA driver shows ",
                     count, "; check nvidia-smi and CUDA_VISIBLE_DEVICES, or choose cpu or auto"));
  }
  const int device = static_cast<int>(index);
  if (memory_limit_bytes == 0) {
    CudaDeviceGuard guard(device);
    MS_RETURN_IF_ERROR(guard.status());
    size_t free = 0;
    size_t total = 0;
    MS_RETURN_IF_ERROR(
        CudaStatus(cudaMemGetInfo(&free, &total), absl::StrCat("ask for the memory of ", name)));
    memory_limit_bytes = total / 4 * 3;
  }
  if (staging_limit_bytes == 0) staging_limit_bytes = DefaultStagingLimit();
  MS_ASSIGN_OR_RETURN(CudaStream up, CudaStream::Create(device));
  MS_ASSIGN_OR_RETURN(CudaStream down, CudaStream::Create(device));
  return std::unique_ptr<CudaDevice>(new CudaDevice(
      device, name, memory_limit_bytes, staging_limit_bytes, std::move(up), std::move(down)));
}

CudaDevice::CudaDevice(int index, std::string name, uint64_t memory_limit_bytes,
                       uint64_t staging_limit_bytes, CudaStream up, CudaStream down)
    : Device(
          BufferPool::Create(name, std::make_unique<CudaMemorySource>(index), memory_limit_bytes)),
      index_(index),
      name_(std::move(name)),
      staging_(index, name_, staging_limit_bytes),
      up_(std::move(up)),
      down_(std::move(down)) {}

absl::StatusOr<std::unique_ptr<HostWriter>> CudaDevice::NewWriter(uint64_t total_bytes) {
  return CudaWriter::Create(*this, total_bytes);
}

absl::StatusOr<std::unique_ptr<HostReader>> CudaDevice::NewReader(uint64_t block_bytes) {
  return CudaReader::Create(*this, block_bytes);
}

absl::Status CudaDevice::FillZero(DeviceBuffer& dst) {
  if (dst.size() == 0) return absl::OkStatus();
  const auto fill = [&]() -> absl::Status {
    // Work of others that comes after it on the stream is not waited for.
    MS_ASSIGN_OR_RETURN(CudaEvent filled, CudaEvent::Create(index_));
    MS_RETURN_IF_ERROR(CudaStatus(cudaMemsetAsync(dst.data(), 0, dst.size(), up_.handle()),
                                  absl::StrCat("fill ", dst.size(), " bytes on ", name_)));
    MS_RETURN_IF_ERROR(filled.Record(up_));
    return filled.Synchronize();
  };
  absl::Status status = fill();
  if (!status.ok()) (void)up_.Synchronize();
  return Note(std::move(status));
}

int GpuCount() { return CudaDeviceCount(); }

absl::StatusOr<std::unique_ptr<Device>> MakeGpuDevice(uint32_t index, uint64_t memory_limit_bytes,
                                                      uint64_t staging_limit_bytes) {
  return CudaDevice::Create(index, memory_limit_bytes, staging_limit_bytes);
}

}  // namespace modelstate
