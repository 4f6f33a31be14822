#include "server/device/cuda/cuda_memory_source.h"

#include <cuda_runtime_api.h>

#include "server/device/cuda/cuda_status.h"

namespace modelstate {

void* CudaMemorySource::Allocate(size_t bytes) {
  CudaDeviceGuard guard(device_);
  void* data = nullptr;
  // The pool says which device has no memory, and how much was asked for. What is not a want of
  // memory but a broken device fails at the next copy, with its own name.
  if (!guard.status().ok() || !CudaStatus(cudaMalloc(&data, bytes), "allocate").ok()) {
    return nullptr;
  }
  return data;
}

void CudaMemorySource::Free(void* ptr, size_t) { (void)cudaFree(ptr); }

}  // namespace modelstate
