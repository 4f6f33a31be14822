#ifndef MODELSTATE_SERVER_DEVICE_DEVICE_H_
#define MODELSTATE_SERVER_DEVICE_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/device/buffer_pool.h"
#include "server/device/hold_admission.h"

namespace modelstate {

// A place where tensors live. One object per device for the life of the server. Thread-safe.
class Device {
 public:
  virtual ~Device() = default;

  virtual const std::string& name() const = 0;  // "cpu", "cpu:1", "cuda:0"

  // Whether buffers may be read and written by the host through their address.
  virtual bool host_visible() const = 0;

  const std::shared_ptr<BufferPool>& pool() const { return pool_; }
  const std::shared_ptr<HoldAdmission>& holds() const { return holds_; }

  // Copies between host memory and `[offset, offset + span.size())` of the buffer, which must lie
  // inside it. They return when the copy is complete.
  virtual absl::Status CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst,
                                    uint64_t offset) = 0;
  virtual absl::Status CopyToHost(const DeviceBuffer& src, uint64_t offset,
                                  absl::Span<uint8_t> dst) = 0;
  virtual absl::Status FillZero(DeviceBuffer& dst) = 0;

 protected:
  explicit Device(std::shared_ptr<BufferPool> pool)
      : pool_(std::move(pool)), holds_(std::make_shared<HoldAdmission>(pool_)) {}

 private:
  const std::shared_ptr<BufferPool> pool_;
  const std::shared_ptr<HoldAdmission> holds_;
};

// `spec` is "cpu", "cpu:N" with N from 1 on (a further pool of host memory with a limit of its
// own), "cuda:N" or "auto" (the host: no flow runs on a GPU yet, docs/gpu.md); anything else is
// INVALID_ARGUMENT INVALID_FIELD. A GPU that is asked for and not there, or not built in, is
// FAILED_PRECONDITION and never a silent CPU. `memory_limit_bytes`: 0 is three quarters of the
// device's memory.
absl::StatusOr<std::unique_ptr<Device>> MakeDevice(absl::string_view spec,
                                                   uint64_t memory_limit_bytes);

// The devices of a comma-separated list of such specs, at least one, none twice. Each has
// `memory_limit_bytes`; 0: three quarters of its memory, which pools of host memory share evenly.
absl::StatusOr<std::vector<std::unique_ptr<Device>>> MakeDevices(absl::string_view specs,
                                                                 uint64_t memory_limit_bytes);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_DEVICE_H_
