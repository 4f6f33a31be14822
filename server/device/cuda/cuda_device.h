#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_DEVICE_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/device/cuda/cuda_stream.h"
#include "server/device/cuda/staging.h"
#include "server/device/device.h"

namespace modelstate {

// Tensors in the memory of one GPU. Transfers go through pinned memory, on a stream for each
// direction, so that those to the GPU, those from it and steps run beside each other. Thread-safe.
//
// A transfer waits for no other stream: what work on another has written is there once that work's
// event has passed.
class CudaDevice : public Device {
 public:
  // `memory_limit_bytes`: 0 is three quarters of the GPU's memory. FAILED_PRECONDITION when there
  // is no GPU of this number; RESOURCE_EXHAUSTED DEVICE_MEMORY.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Create(uint32_t index,
                                                            uint64_t memory_limit_bytes,
                                                            uint64_t staging_limit_bytes = 0);

  const std::string& name() const override { return name_; }
  bool host_visible() const override { return false; }
  absl::StatusOr<std::unique_ptr<HostWriter>> NewWriter(uint64_t total_bytes) override;
  absl::StatusOr<std::unique_ptr<HostReader>> NewReader(uint64_t block_bytes) override;
  absl::Status FillZero(DeviceBuffer& dst) override;

  int index() const { return index_; }
  Staging& staging() { return staging_; }
  const CudaStream& up() const { return up_; }      // to the GPU
  const CudaStream& down() const { return down_; }  // from it

 private:
  CudaDevice(int index, std::string name, uint64_t memory_limit_bytes, uint64_t staging_limit_bytes,
             CudaStream up, CudaStream down);

  const int index_;
  const std::string name_;
  Staging staging_;
  const CudaStream up_;
  const CudaStream down_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_DEVICE_H_
