#ifndef MODELSTATE_SERVER_DEVICE_CPU_CPU_DEVICE_H_
#define MODELSTATE_SERVER_DEVICE_CPU_CPU_DEVICE_H_

#include <string>

#include "server/device/device.h"

namespace modelstate {

// Tensors in host memory. Several of them, "cpu", "cpu:1" and so on, are pools of that one memory
// with a limit each. Thread-safe.
class CpuDevice : public Device {
 public:
  // `memory_limit_bytes`: 0 is three quarters of HostMemoryBytes().
  explicit CpuDevice(uint64_t memory_limit_bytes, std::string name = "cpu");
  // With another source of memory, for tests.
  CpuDevice(std::unique_ptr<MemorySource> source, uint64_t memory_limit_bytes,
            std::string name = "cpu");

  const std::string& name() const override { return name_; }
  bool host_visible() const override { return true; }
  absl::Status CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst,
                            uint64_t offset) override;
  absl::Status CopyToHost(const DeviceBuffer& src, uint64_t offset,
                          absl::Span<uint8_t> dst) override;
  absl::Status FillZero(DeviceBuffer& dst) override;

 private:
  const std::string name_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CPU_CPU_DEVICE_H_
