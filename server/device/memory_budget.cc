#include "server/device/memory_budget.h"

#include <cassert>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace modelstate {

absl::StatusOr<MemoryBudget::Reservation> MemoryBudget::Reserve(uint64_t bytes) {
  uint64_t used = used_.load(std::memory_order_relaxed);
  while (bytes <= limit_ && used <= limit_ - bytes) {
    if (used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed)) {
      return Reservation(shared_from_this(), bytes);
    }
  }
  absl::Status error = MakeError(
      reason_,
      absl::StrCat(what_, ": ", bytes, " bytes are needed, ", used, " of ", limit_, " are in use; ",
                   bytes <= limit_ ? "try again later or " : "", "raise the server's ", flag_),
      {{"requested_bytes", absl::StrCat(bytes)},
       {"used_bytes", absl::StrCat(used)},
       {"limit_bytes", absl::StrCat(limit_)},
       {"flag", flag_}});
  // Waiting does not help a request that is larger than the whole budget.
  return bytes <= limit_ ? WithRetryAfter(std::move(error), absl::Seconds(1)) : error;
}

void MemoryBudget::Reservation::Release() {
  if (budget_ != nullptr) budget_->used_.fetch_sub(bytes_, std::memory_order_relaxed);
  budget_ = nullptr;
  bytes_ = 0;
}

void MemoryBudget::Reservation::Merge(Reservation other) {
  if (budget_ == nullptr) {
    *this = std::move(other);
    return;
  }
  assert(other.budget_ == nullptr || other.budget_ == budget_);
  bytes_ += std::exchange(other.bytes_, 0);
}

void MemoryBudget::Reservation::Shrink(uint64_t bytes) {
  assert(bytes <= bytes_);
  if (budget_ != nullptr) budget_->used_.fetch_sub(bytes, std::memory_order_relaxed);
  bytes_ -= bytes;
}

}  // namespace modelstate
