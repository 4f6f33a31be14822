#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_DEVICE_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/device/cuda/cuda_stream.h"
#include "server/device/cuda/staging_ring.h"
#include "server/device/device.h"

namespace modelstate {

// Tensors in the memory of one GPU. Copies go through pinned memory, on a stream for each
// direction, so that those to the GPU and those from it run beside each other; two of one direction
// take turns. Thread-safe.
//
// A copy waits for no other stream: what work on another has written is there once that work's
// event has passed.
class CudaDevice : public Device {
 public:
  // `memory_limit_bytes`: 0 is three quarters of the GPU's memory. FAILED_PRECONDITION when there
  // is no GPU of this number; RESOURCE_EXHAUSTED DEVICE_MEMORY.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Create(uint32_t index,
                                                            uint64_t memory_limit_bytes);

  const std::string& name() const override { return name_; }
  bool host_visible() const override { return false; }
  absl::Status CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst,
                            uint64_t offset) override;
  absl::Status CopyToHost(const DeviceBuffer& src, uint64_t offset,
                          absl::Span<uint8_t> dst) override;
  absl::Status FillZero(DeviceBuffer& dst) override;

 private:
  // One direction. Members end in the opposite order: the ring waits for its copies.
  struct Lane {
    Lane(std::unique_ptr<CudaStream> stream, StagingRing ring)
        : stream(std::move(stream)), ring(std::move(ring)) {}
    absl::Mutex mutex;
    const std::unique_ptr<CudaStream> stream;  // where the ring can point to it
    StagingRing ring ABSL_GUARDED_BY(mutex);
  };
  static absl::StatusOr<std::unique_ptr<Lane>> MakeLane(int index);

  CudaDevice(int index, std::string name, uint64_t memory_limit_bytes, std::unique_ptr<Lane> up,
             std::unique_ptr<Lane> down);

  const std::string name_;
  const std::unique_ptr<Lane> up_;
  const std::unique_ptr<Lane> down_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_DEVICE_H_
