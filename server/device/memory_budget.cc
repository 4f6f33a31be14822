#include "server/device/memory_budget.h"

#include <algorithm>
#include <cassert>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace modelstate {

absl::StatusOr<MemoryBudget::Reservation> MemoryBudget::Reserve(uint64_t bytes) {
  const uint64_t limit = this->limit();
  uint64_t used = used_.load(std::memory_order_relaxed);
  while (bytes <= limit && used <= limit - bytes) {
    if (used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed)) {
      return Reservation(shared_from_this(), bytes);
    }
  }
  const bool given_back = limit == 0 && is_part_.load(std::memory_order_relaxed);
  const std::string text =
      given_back ? absl::StrCat(what_, ": ", bytes,
                                " bytes are needed, and none are set aside since the configuration "
                                "changed: try again, other memory is used then")
                 : absl::StrCat(what_, ": ", bytes, " bytes are needed, ", used, " of ", limit,
                                " are in use; ", bytes <= limit ? "try again later or " : "",
                                "raise the server's ", flag_);
  absl::Status error = MakeError(reason_, text,
                                 {{"requested_bytes", absl::StrCat(bytes)},
                                  {"used_bytes", absl::StrCat(used)},
                                  {"limit_bytes", absl::StrCat(limit)},
                                  {"flag", flag_}});
  // Waiting does not help a request that is larger than the whole budget.
  return bytes <= limit || given_back ? WithRetryAfter(std::move(error), absl::Seconds(1)) : error;
}

absl::Status MemoryBudget::SetAside(MemoryBudget& parent, uint64_t bytes) {
  const uint64_t held = set_aside_.bytes();
  if (bytes > held) {
    MS_ASSIGN_OR_RETURN(Reservation more, parent.Reserve(bytes - held));
    set_aside_.Merge(std::move(more));
  }
  is_part_.store(true, std::memory_order_relaxed);
  limit_.store(bytes, std::memory_order_relaxed);
  const uint64_t needed = std::max(bytes, used());
  if (needed < held) set_aside_.Shrink(held - needed);
  return absl::OkStatus();
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
