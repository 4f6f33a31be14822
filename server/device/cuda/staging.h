#ifndef MODELSTATE_SERVER_DEVICE_CUDA_STAGING_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_STAGING_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/device/buffer_pool.h"
#include "server/device/cuda/copy_list.h"
#include "server/device/cuda/cuda_stream.h"
#include "server/device/memory_budget.h"

namespace modelstate {

// Pinned memory of the host for the transfers of one GPU: a pool, so that none is allocated in
// steady state, with a limit. What a transfer may use at once is reserved when it begins.
// Thread-safe.
class Staging {
 public:
  // `name` is for messages. `limit_bytes` may be reserved.
  Staging(int device, const std::string& name, uint64_t limit_bytes);

  absl::StatusOr<MemoryBudget::Reservation> Reserve(uint64_t bytes) {
    return budget_->Reserve(bytes);
  }
  // A multiple of 64. RESOURCE_EXHAUSTED DEVICE_MEMORY. The buffer may outlive this object.
  absl::StatusOr<DeviceBuffer> Allocate(uint64_t bytes) { return pool_->Allocate(bytes); }

  // Events are used again too: to make and destroy one holds what every other call of the runtime
  // waits for, steps included. REQUIRES of GiveBack: what it recorded has passed.
  absl::StatusOr<CudaEvent> TakeEvent();
  void GiveBack(CudaEvent event);

 private:
  const int device_;
  const std::shared_ptr<MemoryBudget> budget_;
  const std::shared_ptr<BufferPool> pool_;
  absl::Mutex mutex_;
  std::vector<CudaEvent> events_ ABSL_GUARDED_BY(mutex_);
};

// Copies that go as one: each by itself where they are few, else by one kernel. Adjacent ones of
// one buffer are made one. Thread-compatible.
class CopyBatch {
 public:
  // As many bytes of pinned memory as the list takes that copies at most `bytes` in at most
  // `copies` pieces.
  static uint64_t ListBytes(uint64_t bytes, uint64_t copies);

  // `buffer` is the device's end of it.
  void Add(const uint8_t* from, uint8_t* to, uint64_t bytes, const DeviceBuffer& buffer);
  size_t size() const { return copies_.size(); }

  // Enqueues, and is empty then. `list`: pinned memory of ListBytes, in use until the stream has
  // come past it. `kind`: of all of them.
  absl::Status Enqueue(cudaMemcpyKind kind, uint8_t* list, const CudaStream& stream);

 private:
  std::vector<CudaCopy> copies_;
  const uint8_t* last_buffer_ = nullptr;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_STAGING_H_
