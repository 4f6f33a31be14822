#ifndef MODELSTATE_SERVER_DEVICE_BUFFER_POOL_H_
#define MODELSTATE_SERVER_DEVICE_BUFFER_POOL_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

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
  uint8_t* data() const { return ptr_; }
  size_t size() const { return bytes_; }

 private:
  friend class BufferPool;
  DeviceBuffer(BufferPool* pool, uint8_t* ptr, size_t bytes);

  BufferPool* pool_ = nullptr;
  uint8_t* ptr_ = nullptr;
  size_t bytes_ = 0;
};

// Recycles buffers of exactly equal size: a training step asks for the same sizes again and again,
// so in steady state it allocates nothing. Freed buffers are kept; they are given back to the
// source when a new size would not fit below the limit otherwise.
//
// Where there are many small buffers of a size they are cut from slabs: then they lie side by side,
// in few pages. A slab is given back to the source when all of it is free. Buffers that were freed
// first are handed out first: those of a module stay in the order of its tensors, so that whoever
// walks over them reads memory in sequence. Thread-safe.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  // `device` is for messages. `limit_bytes` bounds used and pooled bytes together, but for pooled
  // ones that only their own size can use, as their slab is not free. What is not yet cut from
  // slabs counts as neither; it is at most a sixteenth more.
  static std::shared_ptr<BufferPool> Create(std::string device,
                                            std::unique_ptr<MemorySource> source,
                                            uint64_t limit_bytes);
  ~BufferPool();

  // RESOURCE_EXHAUSTED DEVICE_MEMORY, with a retry hint.
  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes);

  // Takes back buffers, of whatever pools, at once; they are empty then. What the end of each would
  // do, at less cost where there are many.
  static void ReturnAll(absl::Span<DeviceBuffer> buffers);

  // Gives all free buffers back to the source, less those in slabs that are still in use.
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

  struct Slab {
    uint8_t* begin = nullptr;
    size_t bytes = 0;  // as the source knows it
    size_t count = 0;  // of buffers that it has room for
    size_t cut = 0;    // of those that were handed out at least once
  };
  // All buffers of one size.
  struct SizeClass {
    std::deque<uint8_t*> free;
    std::vector<Slab> slabs;  // all but the last are fully cut
    size_t count = 0;         // of buffers, over all slabs
  };
  void Return(absl::Span<DeviceBuffer> buffers);
  DeviceBuffer HandOut(uint8_t* ptr, size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  uint8_t* Recycle(size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Null when the source has no more.
  uint8_t* Cut(size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TrimLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string device_;
  const std::unique_ptr<MemorySource> source_;
  const uint64_t limit_;

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<size_t, SizeClass> sizes_ ABSL_GUARDED_BY(mutex_);
  // While there are buffers: they need no count of the pool each.
  std::shared_ptr<BufferPool> self_ ABSL_GUARDED_BY(mutex_);
  uint64_t buffers_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t used_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t pooled_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_BUFFER_POOL_H_
