#include "server/state/cast_cache.h"

#include <algorithm>
#include <utility>

#include "common/base/tensor_cast.h"

namespace modelstate {

CastTensor::CastTensor(DType from, DType to, uint64_t nbytes, MemoryBudget::Reservation reservation)
    : from_(from),
      to_(to),
      nbytes_(nbytes),
      reservation_(std::move(reservation)),
      bytes_(
          new uint8_t[nbytes]),  // not cleared: a page is first touched by the cast that fills it
      pieces_((nbytes + kPieceBytes - 1) / kPieceBytes) {}

absl::Span<const uint8_t> CastTensor::Get(absl::Span<const uint8_t> source, uint64_t begin,
                                          uint64_t end) {
  for (uint64_t piece = begin / kPieceBytes; piece * kPieceBytes < end; ++piece) {
    if (!MakePiece(source, piece)) return {};
  }
  return {bytes_.get() + begin, end - begin};
}

bool CastTensor::MakePiece(absl::Span<const uint8_t> source, uint64_t piece) {
  std::atomic<State>& state = pieces_[piece];
  if (state.load(std::memory_order_acquire) == State::kMade) return true;
  State missing = State::kMissing;
  if (!state.compare_exchange_strong(missing, State::kBeingMade, std::memory_order_acquire)) {
    return missing == State::kMade;
  }
  const uint64_t width = DTypeSize(to_);
  const uint64_t first = piece * kPieceBytes / width;
  const uint64_t last = std::min((piece + 1) * kPieceBytes, nbytes_) / width;
  CastElements(from_, source.data() + first * DTypeSize(from_), to_, bytes_.get() + first * width,
               static_cast<int64_t>(last - first));
  state.store(State::kMade, std::memory_order_release);
  return true;
}

std::optional<uint64_t> CastTensor::CachedDigest() const {
  if (!has_digest_.load(std::memory_order_acquire)) return std::nullopt;
  return digest_.load(std::memory_order_relaxed);
}

void CastTensor::CacheDigest(uint64_t digest) {
  digest_.store(digest, std::memory_order_relaxed);
  has_digest_.store(true, std::memory_order_release);
}

RefPtr<CastTensor> CastCache::Find(uint32_t index, DType from, DType to, uint64_t nbytes,
                                   MemoryBudget& budget) {
  absl::MutexLock lock(&mutex_);
  std::vector<RefPtr<CastTensor>>& tensors = tensors_[to];
  if (tensors.size() <= index) tensors.resize(index + 1);
  if (!tensors[index]) {
    absl::StatusOr<MemoryBudget::Reservation> reservation = budget.Reserve(nbytes);
    if (!reservation.ok()) return RefPtr<CastTensor>();
    tensors[index] =
        RefPtr<CastTensor>::Adopt(new CastTensor(from, to, nbytes, *std::move(reservation)));
  }
  return tensors[index];
}

}  // namespace modelstate
