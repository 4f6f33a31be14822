#include "server/device/buffer_pool.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSlabBytes = size_t{2} << 20;  // a huge page
constexpr size_t kSlabGrowth = 16;              // a slab adds at most a sixteenth of what there is

// From one buffer of a slab to the next.
size_t Stride(size_t bytes) {
  return bytes > kSlabBytes ? bytes : (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// How many buffers the largest slab has; a single one where many would leave much of it unused.
size_t SlabCount(size_t stride) { return stride > kSlabBytes / 16 ? 1 : kSlabBytes / stride; }

}  // namespace

DeviceBuffer::DeviceBuffer(BufferPool* pool, uint8_t* ptr, size_t bytes)
    : pool_(pool), ptr_(ptr), bytes_(bytes) {}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)),
      ptr_(std::exchange(other.ptr_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    BufferPool::ReturnAll(absl::MakeSpan(this, 1));
    pool_ = std::exchange(other.pool_, nullptr);
    ptr_ = std::exchange(other.ptr_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

DeviceBuffer::~DeviceBuffer() { BufferPool::ReturnAll(absl::MakeSpan(this, 1)); }

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
    if (bytes <= limit_ && used_ <= limit_ - bytes) {
      uint8_t* ptr = Recycle(bytes);
      if (ptr == nullptr) {
        if (pooled_ > limit_ - bytes - used_) TrimLocked();
        ptr = Cut(bytes);
      }
      if (ptr == nullptr && pooled_ > 0) {
        TrimLocked();
        ptr = Cut(bytes);
      }
      if (ptr != nullptr) return HandOut(ptr, bytes);
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

DeviceBuffer BufferPool::HandOut(uint8_t* ptr, size_t bytes) {
  if (buffers_++ == 0) self_ = shared_from_this();
  used_ += bytes;
  return DeviceBuffer(this, ptr, bytes);
}

uint8_t* BufferPool::Recycle(size_t bytes) {
  const auto it = sizes_.find(bytes);
  if (it == sizes_.end() || it->second.free.empty()) return nullptr;
  uint8_t* const ptr = it->second.free.front();
  it->second.free.pop_front();
  pooled_ -= bytes;
  return ptr;
}

uint8_t* BufferPool::Cut(size_t bytes) {
  const size_t stride = Stride(bytes);
  SizeClass& size_class = sizes_[bytes];
  if (size_class.slabs.empty() || size_class.slabs.back().cut == size_class.slabs.back().count) {
    const size_t largest = SlabCount(stride);
    Slab slab;
    slab.count = std::clamp<size_t>(size_class.count / kSlabGrowth, 1, largest);
    slab.bytes =
        slab.count > 1 && slab.count == largest ? kSlabBytes : (slab.count - 1) * stride + bytes;
    slab.begin = static_cast<uint8_t*>(source_->Allocate(slab.bytes));
    if (slab.begin == nullptr) return nullptr;
    size_class.slabs.push_back(slab);
    size_class.count += slab.count;
  }
  Slab& slab = size_class.slabs.back();
  return slab.begin + stride * slab.cut++;
}

void BufferPool::TrimLocked() {
  uint64_t trimmed = 0;
  for (auto& [bytes, size_class] : sizes_) {
    std::deque<uint8_t*> free = std::move(size_class.free);
    std::sort(free.begin(), free.end());
    size_class.free.clear();
    std::erase_if(size_class.slabs, [&, bytes = bytes, &size_class = size_class](const Slab& slab) {
      const auto begin = std::lower_bound(free.begin(), free.end(), slab.begin);
      const auto end = std::lower_bound(begin, free.end(), slab.begin + slab.bytes);
      if (static_cast<size_t>(end - begin) < slab.cut) {
        size_class.free.insert(size_class.free.end(), begin, end);
        return false;
      }
      source_->Free(slab.begin, slab.bytes);
      size_class.count -= slab.count;
      trimmed += slab.cut * bytes;
      return true;
    });
  }
  pooled_ -= trimmed;
  absl::erase_if(sizes_, [](const auto& entry) { return entry.second.slabs.empty(); });
}

void BufferPool::ReturnAll(absl::Span<DeviceBuffer> buffers) {
  for (size_t begin = 0; begin < buffers.size();) {
    BufferPool* const pool = buffers[begin].pool_;
    size_t end = begin + 1;
    while (end < buffers.size() && buffers[end].pool_ == pool) ++end;
    if (pool != nullptr) pool->Return(buffers.subspan(begin, end - begin));
    begin = end;
  }
}

void BufferPool::Return(absl::Span<DeviceBuffer> buffers) {
  std::shared_ptr<BufferPool> last;  // ends after the lock, and the pool maybe with it
  absl::MutexLock lock(&mutex_);
  size_t bytes = 0;
  SizeClass* size_class = nullptr;  // of `bytes`
  for (DeviceBuffer& buffer : buffers) {
    if (size_class == nullptr || buffer.bytes_ != bytes) {
      bytes = buffer.bytes_;
      size_class = &sizes_[bytes];
    }
    size_class->free.push_back(buffer.ptr_);
    used_ -= bytes;
    pooled_ += bytes;
    buffer.pool_ = nullptr;
    buffer.ptr_ = nullptr;
    buffer.bytes_ = 0;
  }
  buffers_ -= buffers.size();
  if (buffers_ == 0) last = std::move(self_);
}

BufferPool::Usage BufferPool::usage() const {
  absl::MutexLock lock(&mutex_);
  return {limit_, used_, pooled_};
}

}  // namespace modelstate
