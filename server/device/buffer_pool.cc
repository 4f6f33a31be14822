#include "server/device/buffer_pool.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/status.h"

namespace modelstate {

DeviceBuffer::DeviceBuffer(std::shared_ptr<BufferPool> pool, void* ptr, size_t bytes)
    : pool_(std::move(pool)), ptr_(ptr), bytes_(bytes) {}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : pool_(std::move(other.pool_)),
      ptr_(std::exchange(other.ptr_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    if (pool_ != nullptr) pool_->Return(ptr_, bytes_);
    pool_ = std::move(other.pool_);
    ptr_ = std::exchange(other.ptr_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (pool_ != nullptr) pool_->Return(ptr_, bytes_);
}

std::shared_ptr<BufferPool> BufferPool::Create(std::string device,
                                               std::unique_ptr<MemorySource> source,
                                               uint64_t limit_bytes) {
  return std::shared_ptr<BufferPool>(
      new BufferPool(std::move(device), std::move(source), limit_bytes));
}

BufferPool::BufferPool(std::string device, std::unique_ptr<MemorySource> source,
                       uint64_t limit_bytes)
    : device_(std::move(device)), source_(std::move(source)), limit_(limit_bytes) {}

BufferPool::~BufferPool() { Trim(); }

absl::StatusOr<DeviceBuffer> BufferPool::Allocate(size_t bytes) {
  if (bytes == 0) return DeviceBuffer();
  uint64_t used = 0;
  {
    absl::MutexLock lock(&mutex_);
    auto it = free_.find(bytes);
    if (it != free_.end() && !it->second.empty()) {
      void* ptr = it->second.back();
      it->second.pop_back();
      pooled_ -= bytes;
      used_ += bytes;
      return DeviceBuffer(shared_from_this(), ptr, bytes);
    }
    if (bytes <= limit_ && used_ <= limit_ - bytes) {
      if (pooled_ > limit_ - bytes - used_) TrimLocked();
      void* ptr = source_->Allocate(bytes);
      if (ptr == nullptr && pooled_ > 0) {
        TrimLocked();
        ptr = source_->Allocate(bytes);
      }
      if (ptr != nullptr) {
        used_ += bytes;
        return DeviceBuffer(shared_from_this(), ptr, bytes);
      }
    }
    used = used_;
  }
  return WithRetryAfter(
      MakeError(Reason::kDeviceMemory,
                absl::StrCat("device ", device_, " has no room for ", bytes, " bytes: ", used,
                             " of its ", limit_,
                             " bytes are in use; release snapshots or delete modules and try "
                             "again, or give the server a larger device memory limit"),
                {{"device", device_},
                 {"requested_bytes", absl::StrCat(bytes)},
                 {"used_bytes", absl::StrCat(used)},
                 {"limit_bytes", absl::StrCat(limit_)}}),
      absl::Seconds(1));
}

void BufferPool::Trim() {
  absl::MutexLock lock(&mutex_);
  TrimLocked();
}

void BufferPool::TrimLocked() {
  for (auto& [bytes, pointers] : free_) {
    for (void* ptr : pointers) source_->Free(ptr, bytes);
  }
  free_.clear();
  pooled_ = 0;
}

void BufferPool::Return(void* ptr, size_t bytes) {
  absl::MutexLock lock(&mutex_);
  free_[bytes].push_back(ptr);
  used_ -= bytes;
  pooled_ += bytes;
}

BufferPool::Usage BufferPool::usage() const {
  absl::MutexLock lock(&mutex_);
  return {limit_, used_, pooled_};
}

}  // namespace modelstate
