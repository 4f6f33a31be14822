#include "server/device/cuda/cuda_memory.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/device/cuda/cuda_status.h"

namespace modelstate {

absl::StatusOr<CudaMemory> CudaMemory::Allocate(int device, uint64_t bytes) {
  CudaMemory memory;
  if (bytes == 0) return memory;
  CudaDeviceGuard guard(device);
  MS_RETURN_IF_ERROR(guard.status());
  void* data = nullptr;
  MS_RETURN_IF_ERROR(CudaStatus(cudaMalloc(&data, bytes),
                                absl::StrCat("allocate ", bytes, " bytes on cuda:", device)));
  memory.data_ = static_cast<uint8_t*>(data);
  memory.size_ = bytes;
  return memory;
}

CudaMemory::~CudaMemory() {
  if (data_ != nullptr) (void)cudaFree(data_);
}

absl::StatusOr<PinnedMemory> PinnedMemory::Allocate(uint64_t bytes) {
  PinnedMemory memory;
  if (bytes == 0) return memory;
  void* data = nullptr;
  MS_RETURN_IF_ERROR(CudaStatus(cudaHostAlloc(&data, bytes, cudaHostAllocPortable),
                                absl::StrCat("allocate ", bytes, " bytes of pinned memory")));
  memory.data_ = static_cast<uint8_t*>(data);
  memory.size_ = bytes;
  return memory;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

}  // namespace modelstate
