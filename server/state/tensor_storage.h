#ifndef MODELSTATE_SERVER_STATE_TENSOR_STORAGE_H_
#define MODELSTATE_SERVER_STATE_TENSOR_STORAGE_H_

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/ref_counted.h"
#include "server/device/device.h"

namespace modelstate {

// The bytes of one tensor in the memory of a device, with a reference count.
//
// The rule that everything rests on: what is published is never written. A writer may write through
// a RefPtr<TensorStorage> only before it publishes it, or while it holds the sole reference
// (IsSoleReference()); readers have RefPtr<const TensorStorage>. Reading is thread-safe.
class TensorStorage : public RefCounted<TensorStorage> {
 public:
  // Contents undefined. RESOURCE_EXHAUSTED DEVICE_MEMORY. `device` outlives the storage.
  static absl::StatusOr<RefPtr<TensorStorage>> Allocate(Device& device, uint64_t bytes);
  // From host memory, copied.
  static absl::StatusOr<RefPtr<TensorStorage>> FromHost(Device& device,
                                                        absl::Span<const uint8_t> bytes);

  // Gives up references, at less cost than one by one where they are the last ones of very many.
  static void DropAll(std::vector<RefPtr<const TensorStorage>> storages);

  Device& device() const { return *device_; }
  uint64_t size() const { return buffer_.size(); }
  const DeviceBuffer& buffer() const { return buffer_; }

  // Only as the rule above allows. Forgets the digest.
  DeviceBuffer& MutableBuffer();
  // The same, as host memory. REQUIRES: device().host_visible().
  absl::Span<uint8_t> MutableHostBytes();

  // REQUIRES: device().host_visible(). Valid while the caller holds a reference.
  absl::Span<const uint8_t> HostBytes() const { return {buffer_.data(), buffer_.size()}; }
  absl::Status CopyToHost(uint64_t offset, absl::Span<uint8_t> out) const;

  // XXH3 of the bytes, computed once and kept: by whoever first needs or happens to have it.
  // Computing reads all bytes in the calling thread.
  absl::StatusOr<uint64_t> Digest() const;
  std::optional<uint64_t> CachedDigest() const;
  // REQUIRES: `digest` is that of the bytes.
  void CacheDigest(uint64_t digest) const;

 private:
  friend class RefCounted<TensorStorage>;
  friend class HoldLedger;
  TensorStorage(Device& device, DeviceBuffer buffer)
      : device_(&device), buffer_(std::move(buffer)) {}
  ~TensorStorage() = default;

  Device* const device_;
  DeviceBuffer buffer_;
  mutable std::atomic<uint64_t> digest_{0};
  mutable std::atomic<bool> has_digest_{false};
  // HeldVersions that refer to it; guarded by the lock of its module's HoldLedger.
  mutable uint32_t holds_ = 0;
};

// What a version holds: shared, read only.
using StorageRef = RefPtr<const TensorStorage>;

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_TENSOR_STORAGE_H_
