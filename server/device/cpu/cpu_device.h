#ifndef MODELSTATE_SERVER_DEVICE_CPU_CPU_DEVICE_H_
#define MODELSTATE_SERVER_DEVICE_CPU_CPU_DEVICE_H_

#include <memory>
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
  absl::StatusOr<std::unique_ptr<HostWriter>> NewWriter(uint64_t total_bytes) override;
  absl::StatusOr<std::unique_ptr<HostReader>> NewReader(uint64_t block_bytes) override;
  absl::Status FillZero(DeviceBuffer& dst) override;

 private:
  const std::string name_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CPU_CPU_DEVICE_H_
