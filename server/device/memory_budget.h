#ifndef MODELSTATE_SERVER_DEVICE_MEMORY_BUDGET_H_
#define MODELSTATE_SERVER_DEVICE_MEMORY_BUDGET_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "common/base/status.h"

namespace modelstate {

// A number of bytes that may be in use at once for one purpose. Memory is admitted by a reservation
// before it is allocated. Thread-safe, lock-free; outlives its reservations through shared_ptr.
class MemoryBudget : public std::enable_shared_from_this<MemoryBudget> {
 public:
  // Gives its bytes back when it ends. Move-only.
  class Reservation {
   public:
    Reservation() = default;
    Reservation(Reservation&& other) noexcept
        : budget_(std::move(other.budget_)), bytes_(std::exchange(other.bytes_, 0)) {}
    Reservation& operator=(Reservation&& other) noexcept {
      Release();
      budget_ = std::move(other.budget_);
      bytes_ = std::exchange(other.bytes_, 0);
      return *this;
    }
    ~Reservation() { Release(); }
    uint64_t bytes() const { return bytes_; }
    void Release();
    // Takes over the bytes of `other`. REQUIRES: of the same budget, or one of the two is empty.
    void Merge(Reservation other);
    // Gives `bytes` of them back. REQUIRES: no more than bytes().
    void Shrink(uint64_t bytes);

   private:
    friend class MemoryBudget;
    Reservation(std::shared_ptr<MemoryBudget> budget, uint64_t bytes)
        : budget_(std::move(budget)), bytes_(bytes) {}
    std::shared_ptr<MemoryBudget> budget_;
    uint64_t bytes_ = 0;
  };

  // `what` begins the error text: "memory for arriving pushes"; `flag` is the way out: the server
  // flag that raises the limit. `reason` is a RESOURCE_EXHAUSTED one.
  MemoryBudget(Reason reason, std::string what, std::string flag, uint64_t limit_bytes)
      : reason_(reason), what_(std::move(what)), flag_(std::move(flag)), limit_(limit_bytes) {}

  // Makes this one a part of `parent` that is set aside: what is reserved here is reserved there
  // already. Its limit becomes `bytes`; what is in use beyond that stays set aside. On an error,
  // that of `parent`, nothing has changed. Not from two threads at once.
  absl::Status SetAside(MemoryBudget& parent, uint64_t bytes);

  // RESOURCE_EXHAUSTED with the budget's reason when less than `bytes` are left; with a retry hint
  // where they could be free later. Where nothing is set aside (any more), who asks has looked at a
  // configuration that has just ended: that has the hint too.
  absl::StatusOr<Reservation> Reserve(uint64_t bytes);

  uint64_t limit() const { return limit_.load(std::memory_order_relaxed); }
  uint64_t used() const { return used_.load(std::memory_order_relaxed); }

 private:
  const Reason reason_;
  const std::string what_;
  const std::string flag_;
  std::atomic<uint64_t> limit_;
  Reservation set_aside_;             // of the parent
  std::atomic<bool> is_part_{false};  // SetAside was called
  std::atomic<uint64_t> used_{0};
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_MEMORY_BUDGET_H_
