#ifndef MODELSTATE_SERVER_DEVICE_HOLD_ADMISSION_H_
#define MODELSTATE_SERVER_DEVICE_HOLD_ADMISSION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/device/buffer_pool.h"

namespace modelstate {

// What the next steps of a module take from its device. All 0 without an optimizer.
struct StepDemand {
  // By each step, until it is over: gradients of the trainable parameters, values of the buffers.
  uint64_t staged_bytes = 0;
  // Optimizer state that does not exist yet: taken once, and kept.
  uint64_t new_state_bytes = 0;
};

// Decides whether one more version may be held on a device, so that readers never take the memory
// that the next step needs. One per device; thread-safe.
//
// A held version that is current costs nothing yet: its module needs the storages anyhow. But it is
// a promise: when a step supersedes the version they stay, where they would have made room. So a
// hold is admitted when afterwards
//
//   used + promised + step <= limit
//
//   used      bytes in use on the device (BufferPool::Usage; not the pooled ones, which are given
//             up when room is needed)
//   promised  over all modules here: bytes of what is current and held (storages of the current
//             version, and optimizer state that a save has captured), and of optimizer state that
//             the next steps create
//   step      the largest StepDemand::staged_bytes of a module here
//   limit     the device's memory limit
//
// A step does not change `used + promised`: what it stages is given back as old parameters, or
// stays in place of a promise. So where a step has fit with the readers of today the steps after it
// fit too, whatever those readers do. Where no module has an optimizer there is no step to protect,
// and every hold is admitted. Two pushes at once, loads, moves and new modules still compete with
// each other for the memory.
class HoldAdmission {
 public:
  struct Refusal {
    uint64_t used_bytes = 0;
    uint64_t promised_bytes = 0;  // with what was asked for
    uint64_t step_bytes = 0;
    uint64_t limit_bytes = 0;
  };

  explicit HoldAdmission(std::shared_ptr<BufferPool> pool) : pool_(std::move(pool)) {}

  // What one module promises and needs on this device; nothing any more when it ends.
  // Thread-compatible.
  class Account {
   public:
    explicit Account(std::shared_ptr<HoldAdmission> admission);
    Account(const Account&) = delete;
    Account& operator=(const Account&) = delete;
    ~Account();

    // Without asking: a mutation of the module. `held_bytes` is what is current and held.
    void Set(uint64_t held_bytes, const StepDemand& demand);
    // Without asking: the end of a hold.
    void SetHeld(uint64_t held_bytes) { Set(held_bytes, demand_); }
    // For a hold: sets what is current and held, or says why not and changes nothing. No more than
    // before is always admitted.
    std::optional<Refusal> AdmitHeld(uint64_t held_bytes);

   private:
    const std::shared_ptr<HoldAdmission> admission_;
    uint64_t held_ = 0;
    StepDemand demand_;
  };

  uint64_t promised_bytes() const;

  // Distinct versions that are held, for whoever wants to know.
  uint64_t held_versions() const { return held_versions_.load(std::memory_order_relaxed); }
  void AddHeldVersion() { held_versions_.fetch_add(1, std::memory_order_relaxed); }
  void RemoveHeldVersion() { held_versions_.fetch_sub(1, std::memory_order_relaxed); }

 private:
  const std::shared_ptr<BufferPool> pool_;
  mutable absl::Mutex mutex_;
  uint64_t promised_ ABSL_GUARDED_BY(mutex_) = 0;
  std::multiset<uint64_t> steps_ ABSL_GUARDED_BY(mutex_);  // of every account
  std::atomic<uint64_t> held_versions_{0};
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_HOLD_ADMISSION_H_
