#include "server/device/cpu/cpu_device.h"

#include <cstring>
#include <utility>

#include "common/base/status.h"
#include "server/device/copy_range.h"
#include "server/device/cpu/host_memory_source.h"

namespace modelstate {
CpuDevice::CpuDevice(uint64_t memory_limit_bytes, std::string name)
    : CpuDevice(std::make_unique<HostMemorySource>(),
                memory_limit_bytes != 0 ? memory_limit_bytes : HostMemoryBytes() / 4 * 3,
                std::move(name)) {}

CpuDevice::CpuDevice(std::unique_ptr<MemorySource> source, uint64_t memory_limit_bytes,
                     std::string name)
    : Device(BufferPool::Create(name, std::move(source), memory_limit_bytes)),
      name_(std::move(name)) {}

absl::Status CpuDevice::CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst,
                                     uint64_t offset) {
  MS_RETURN_IF_ERROR(CheckCopyRange(offset, src.size(), dst.size()));
  if (!src.empty()) std::memcpy(dst.data() + offset, src.data(), src.size());
  return absl::OkStatus();
}

absl::Status CpuDevice::CopyToHost(const DeviceBuffer& src, uint64_t offset,
                                   absl::Span<uint8_t> dst) {
  MS_RETURN_IF_ERROR(CheckCopyRange(offset, dst.size(), src.size()));
  if (!dst.empty()) std::memcpy(dst.data(), src.data() + offset, dst.size());
  return absl::OkStatus();
}

absl::Status CpuDevice::FillZero(DeviceBuffer& dst) {
  if (dst.size() > 0) std::memset(dst.data(), 0, dst.size());
  return absl::OkStatus();
}

}  // namespace modelstate
