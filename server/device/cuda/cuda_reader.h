#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_READER_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_READER_H_

#include <cstdint>
#include <memory>

#include "server/device/cuda/staging.h"
#include "server/device/host_transfer.h"

namespace modelstate {

class CudaDevice;

// From a GPU, each read to pinned memory of its own.
class CudaReader : public HostReader {
 public:
  // `device` outlives it and its reads.
  static absl::StatusOr<std::unique_ptr<CudaReader>> Create(CudaDevice& device,
                                                            uint64_t block_bytes);

  absl::StatusOr<std::shared_ptr<HostRead>> Start(absl::Span<const BufferRange> ranges) override;

 private:
  absl::StatusOr<std::shared_ptr<HostRead>> Enqueue(absl::Span<const BufferRange> ranges);

  CudaReader(CudaDevice& device, uint64_t block_bytes, MemoryBudget::Reservation reservation)
      : device_(device), block_bytes_(block_bytes), reservation_(std::move(reservation)) {}

  CudaDevice& device_;
  const uint64_t block_bytes_;
  const MemoryBudget::Reservation reservation_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_READER_H_
