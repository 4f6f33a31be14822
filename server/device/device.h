#ifndef MODELSTATE_SERVER_DEVICE_DEVICE_H_
#define MODELSTATE_SERVER_DEVICE_DEVICE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "server/device/buffer_pool.h"
#include "server/device/hold_admission.h"
#include "server/device/host_transfer.h"

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

  // For transfers of about `total_bytes`, which say how much memory of the host it takes.
  // RESOURCE_EXHAUSTED DEVICE_MEMORY, with a retry hint.
  virtual absl::StatusOr<std::unique_ptr<HostWriter>> NewWriter(uint64_t total_bytes) = 0;
  // For reads of at most `block_bytes`, a few of them at a time. The same error.
  virtual absl::StatusOr<std::unique_ptr<HostReader>> NewReader(uint64_t block_bytes) = 0;
  virtual absl::Status FillZero(DeviceBuffer& dst) = 0;

  // Copies between host memory and `[offset, offset + span.size())` of the buffer, which must lie
  // inside it. They return when the copy is complete.
  absl::Status CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst, uint64_t offset);
  absl::Status CopyToHost(const DeviceBuffer& src, uint64_t offset, absl::Span<uint8_t> dst);

  // OK until the device has failed, which it does not recover from: then what says why. Nothing
  // that it holds is to be trusted.
  absl::Status health() const;
  // Marks the device as failed for a status that says so: INTERNAL. Returns the status. For what
  // works on the device itself, such as kernels.
  absl::Status Note(absl::Status status);
  // Called once, by the thread that finds the failure: it must not block. To be set before the
  // device is used.
  void OnFailure(std::function<void(Device&)> tell);

 protected:
  explicit Device(std::shared_ptr<BufferPool> pool)
      : pool_(std::move(pool)), holds_(std::make_shared<HoldAdmission>(pool_)) {}

 private:
  const std::shared_ptr<BufferPool> pool_;
  const std::shared_ptr<HoldAdmission> holds_;
  std::atomic<bool> failed_{false};
  mutable absl::Mutex mutex_;
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  std::function<void(Device&)> tell_ ABSL_GUARDED_BY(mutex_);
};

// `spec` is "cpu", "cpu:N" with N from 1 on (a further pool of host memory with a limit of its
// own), "cuda:N" ("cuda" is its first) or "auto": cuda:0 where this build has GPUs and the driver
// shows one, else cpu. Anything else is INVALID_ARGUMENT INVALID_FIELD. A GPU that is asked for and
// not there, or not built in, is FAILED_PRECONDITION and never a silent CPU. `memory_limit_bytes`:
// 0 is three quarters of the device's memory. `staging_limit_bytes`: of the host's pinned memory
// that the transfers of a GPU may use at once; 0 is a part of it that is bounded both ways.
absl::StatusOr<std::unique_ptr<Device>> MakeDevice(absl::string_view spec,
                                                   uint64_t memory_limit_bytes,
                                                   uint64_t staging_limit_bytes = 0);

// The devices of a comma-separated list of such specs, at least one, none twice. Each has
// `memory_limit_bytes`; 0: three quarters of its memory, which pools of host memory share evenly.
absl::StatusOr<std::vector<std::unique_ptr<Device>>> MakeDevices(absl::string_view specs,
                                                                 uint64_t memory_limit_bytes,
                                                                 uint64_t staging_limit_bytes = 0);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_DEVICE_H_
