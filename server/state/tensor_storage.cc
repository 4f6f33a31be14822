#include "server/state/tensor_storage.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "common/base/status.h"
#include "server/state/storage_blocks.h"

namespace modelstate {

absl::StatusOr<RefPtr<TensorStorage>> TensorStorage::Allocate(Device& device, uint64_t bytes) {
  MS_ASSIGN_OR_RETURN(DeviceBuffer buffer, device.pool()->Allocate(bytes));
  return RefPtr<TensorStorage>::Adopt(new TensorStorage(device, std::move(buffer)));
}

absl::StatusOr<RefPtr<TensorStorage>> TensorStorage::FromHost(Device& device,
                                                              absl::Span<const uint8_t> bytes) {
  MS_ASSIGN_OR_RETURN(RefPtr<TensorStorage> storage, Allocate(device, bytes.size()));
  MS_RETURN_IF_ERROR(device.CopyFromHost(bytes, storage->buffer_, 0));
  return storage;
}

void TensorStorage::DropAll(std::vector<StorageRef> storages) {
  constexpr size_t kBatch = 256;  // buffers for which the pool is locked once
  constexpr size_t kAhead = 8;
  std::vector<DeviceBuffer> buffers;
  buffers.reserve(std::min(kBatch, storages.size()));
  for (size_t i = 0; i < storages.size(); ++i) {
    if (i + kAhead < storages.size()) __builtin_prefetch(storages[i + kAhead].get());
    if (storages[i] && storages[i]->IsSoleReference()) {
      buffers.push_back(std::move(const_cast<TensorStorage&>(*storages[i]).buffer_));
    }
    storages[i] = nullptr;
    if (buffers.size() < kBatch) continue;
    BufferPool::ReturnAll(absl::MakeSpan(buffers));
    buffers.clear();
  }
  BufferPool::ReturnAll(absl::MakeSpan(buffers));
}

DeviceBuffer& TensorStorage::MutableBuffer() {
  has_digest_.store(false, std::memory_order_relaxed);
  return buffer_;
}

absl::Span<uint8_t> TensorStorage::MutableHostBytes() {
  DeviceBuffer& buffer = MutableBuffer();
  return {buffer.data(), buffer.size()};
}

absl::Status TensorStorage::CopyToHost(uint64_t offset, absl::Span<uint8_t> out) const {
  return device_->CopyToHost(buffer_, offset, out);
}

absl::StatusOr<uint64_t> TensorStorage::Digest() const {
  if (std::optional<uint64_t> cached = CachedDigest()) return *cached;
  const TensorStorage* const self = this;
  MS_RETURN_IF_ERROR(DigestStorages({&self, 1}));
  return *CachedDigest();
}

std::optional<uint64_t> TensorStorage::CachedDigest() const {
  if (!has_digest_.load(std::memory_order_acquire)) return std::nullopt;
  return digest_.load(std::memory_order_relaxed);
}

void TensorStorage::CacheDigest(uint64_t digest) const {
  digest_.store(digest, std::memory_order_relaxed);
  has_digest_.store(true, std::memory_order_release);
}

}  // namespace modelstate
