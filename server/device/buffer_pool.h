#ifndef MODELSTATE_SERVER_DEVICE_BUFFER_POOL_H_
#define MODELSTATE_SERVER_DEVICE_BUFFER_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace modelstate {

// Where a pool gets raw memory from: one per kind of device. Thread-safe.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  // At least 64-byte aligned, contents undefined; nullptr when the device has no more.
  virtual void* Allocate(size_t bytes) = 0;
  virtual void Free(void* ptr, size_t bytes) = 0;
};

class BufferPool;

// Memory of a device, given back to its pool when the buffer ends. Move-only; the pool lives until
// its last buffer is gone. An empty buffer (0 bytes) has a null pointer. Thread-compatible.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  // An address of the device: dereference it on the host only when Device::host_visible().
  uint8_t* data() const { return static_cast<uint8_t*>(ptr_); }
  size_t size() const { return bytes_; }

 private:
  friend class BufferPool;
  DeviceBuffer(std::shared_ptr<BufferPool> pool, void* ptr, size_t bytes);

  std::shared_ptr<BufferPool> pool_;
  void* ptr_ = nullptr;
  size_t bytes_ = 0;
};

// Recycles buffers of exactly equal size: a training step asks for the same sizes again and again,
// so in steady state it allocates nothing. Freed buffers are kept; they are given back to the
// source when a new size would not fit below the limit otherwise. Thread-safe.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  // `device` is for messages. `limit_bytes` bounds used and pooled bytes together.
  static std::shared_ptr<BufferPool> Create(std::string device,
                                            std::unique_ptr<MemorySource> source,
                                            uint64_t limit_bytes);
  ~BufferPool();

  // RESOURCE_EXHAUSTED DEVICE_MEMORY, with a retry hint.
  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes);

  // Gives all free buffers back to the source.
  void Trim();

  struct Usage {
    uint64_t limit_bytes = 0;
    uint64_t used_bytes = 0;
    uint64_t pooled_bytes = 0;
  };
  Usage usage() const;

 private:
  friend class DeviceBuffer;
  BufferPool(std::string device, std::unique_ptr<MemorySource> source, uint64_t limit_bytes);
  void Return(void* ptr, size_t bytes);
  void TrimLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string device_;
  const std::unique_ptr<MemorySource> source_;
  const uint64_t limit_;

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<size_t, std::vector<void*>> free_ ABSL_GUARDED_BY(mutex_);
  uint64_t used_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t pooled_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_BUFFER_POOL_H_
