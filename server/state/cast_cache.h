#ifndef MODELSTATE_SERVER_STATE_CAST_CACHE_H_
#define MODELSTATE_SERVER_STATE_CAST_CACHE_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "common/base/ref_counted.h"
#include "server/device/memory_budget.h"

namespace modelstate {

// The elements of one tensor in another dtype, made piece by piece by whoever first wants a piece,
// in host memory. Thread-safe.
class CastTensor : public RefCounted<CastTensor> {
 public:
  static constexpr uint64_t kPieceBytes = uint64_t{1} << 20;

  // `nbytes` in the dtype `to`.
  CastTensor(DType from, DType to, uint64_t nbytes, MemoryBudget::Reservation reservation);

  // Bytes [begin, end), not empty, of the cast of `source`, all of the tensor's elements. Empty:
  // another thread is just making a part of them.
  absl::Span<const uint8_t> Get(absl::Span<const uint8_t> source, uint64_t begin, uint64_t end);

  // XXH3 of all bytes, for whoever needs it after who had it.
  std::optional<uint64_t> CachedDigest() const;
  void CacheDigest(uint64_t digest);

 private:
  friend class RefCounted<CastTensor>;
  ~CastTensor() = default;
  bool MakePiece(absl::Span<const uint8_t> source, uint64_t piece);

  enum class State : uint8_t { kMissing, kBeingMade, kMade };

  const DType from_;
  const DType to_;
  const uint64_t nbytes_;
  const MemoryBudget::Reservation reservation_;
  const std::unique_ptr<uint8_t[]> bytes_;
  std::vector<std::atomic<State>> pieces_;
  std::atomic<uint64_t> digest_{0};
  std::atomic<bool> has_digest_{false};
};

// The casts of one version, which live as long as it is held, so that its readers share them.
// Thread-safe.
class CastCache {
 public:
  // Of the tensor at `index` of the schema (of tied names the owner), which is `from` and has
  // `nbytes` in `to`. null: `budget` has no room for it.
  RefPtr<CastTensor> Find(uint32_t index, DType from, DType to, uint64_t nbytes,
                          MemoryBudget& budget);

 private:
  absl::Mutex mutex_;
  std::map<DType, std::vector<RefPtr<CastTensor>>> tensors_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_CAST_CACHE_H_
