#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_MEMORY_SOURCE_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_MEMORY_SOURCE_H_

#include <cstddef>

#include "server/device/buffer_pool.h"

namespace modelstate {

// Memory of one GPU for a pool. Both functions wait for the whole device. Thread-safe. REQUIRES of
// Free: no work that uses the memory is left.
class CudaMemorySource : public MemorySource {
 public:
  explicit CudaMemorySource(int device) : device_(device) {}
  void* Allocate(size_t bytes) override;  // a multiple of 256
  void Free(void* ptr, size_t bytes) override;

 private:
  const int device_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_MEMORY_SOURCE_H_
