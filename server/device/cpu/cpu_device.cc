#include "server/device/cpu/cpu_device.h"

#include <cstring>
#include <utility>
#include <vector>

#include "server/device/cpu/host_memory_source.h"

namespace modelstate {
namespace {

class InPlaceWriter : public HostWriter {
 public:
  absl::Span<uint8_t> Reserve(DeviceBuffer& dst, uint64_t offset, uint64_t max) override {
    return {dst.data() + offset, max};
  }
  absl::Status Finish() override { return absl::OkStatus(); }
};

// What is already there.
class CopiedBytes : public HostRead {
 public:
  explicit CopiedBytes(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {}
  absl::StatusOr<absl::Span<const uint8_t>> Wait() override { return absl::MakeConstSpan(bytes_); }

 private:
  const std::vector<uint8_t> bytes_;
};

class CopyingReader : public HostReader {
 public:
  absl::StatusOr<std::shared_ptr<HostRead>> Start(absl::Span<const BufferRange> ranges) override {
    std::vector<uint8_t> bytes;
    for (const BufferRange& range : ranges) {
      const uint8_t* begin = range.buffer->data() + range.offset;
      bytes.insert(bytes.end(), begin, begin + range.bytes);
    }
    return std::make_shared<CopiedBytes>(std::move(bytes));
  }
};

}  // namespace

CpuDevice::CpuDevice(uint64_t memory_limit_bytes, std::string name)
    : CpuDevice(std::make_unique<HostMemorySource>(),
                memory_limit_bytes != 0 ? memory_limit_bytes : HostMemoryBytes() / 4 * 3,
                std::move(name)) {}

CpuDevice::CpuDevice(std::unique_ptr<MemorySource> source, uint64_t memory_limit_bytes,
                     std::string name)
    : Device(BufferPool::Create(name, std::move(source), memory_limit_bytes)),
      name_(std::move(name)) {}

absl::StatusOr<std::unique_ptr<HostWriter>> CpuDevice::NewWriter(uint64_t) {
  return std::make_unique<InPlaceWriter>();
}

absl::StatusOr<std::unique_ptr<HostReader>> CpuDevice::NewReader(uint64_t) {
  return std::make_unique<CopyingReader>();
}

absl::Status CpuDevice::FillZero(DeviceBuffer& dst) {
  if (dst.size() > 0) std::memset(dst.data(), 0, dst.size());
  return absl::OkStatus();
}

}  // namespace modelstate
