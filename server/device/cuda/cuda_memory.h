#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_MEMORY_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"

namespace modelstate {

// Memory of a GPU. Move-only. Allocating and freeing wait for the whole device: take large pieces,
// and keep them. REQUIRES: when it goes, no work that uses it is left; the streams know nothing of
// it.
class CudaMemory {
 public:
  // Of 0 bytes: a null pointer. RESOURCE_EXHAUSTED DEVICE_MEMORY.
  static absl::StatusOr<CudaMemory> Allocate(int device, uint64_t bytes);
  CudaMemory() = default;
  CudaMemory(CudaMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  CudaMemory& operator=(CudaMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~CudaMemory();

  uint8_t* data() const { return data_; }  // a multiple of 256
  uint64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

// Host memory that the devices read and write themselves: only copies from and to it run while the
// host goes on. Move-only. REQUIRES: when it goes, no copy that uses it is left.
class PinnedMemory {
 public:
  // Of 0 bytes: a null pointer. RESOURCE_EXHAUSTED DEVICE_MEMORY.
  static absl::StatusOr<PinnedMemory> Allocate(uint64_t bytes);
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~PinnedMemory();

  uint8_t* data() const { return data_; }  // page-aligned
  uint64_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_MEMORY_H_
