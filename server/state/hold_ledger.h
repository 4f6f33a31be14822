#ifndef MODELSTATE_SERVER_STATE_HOLD_LEDGER_H_
#define MODELSTATE_SERVER_STATE_HOLD_LEDGER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/device/hold_admission.h"
#include "server/device/memory_budget.h"
#include "server/state/module_version.h"
#include "server/state/optimizer_state.h"
#include "server/state/snapshot.h"

namespace modelstate {

// Who holds which versions of one module, and what that costs.
//
// Exact: every distinct storage that at least one held version refers to (the current version
// included when it is held) is charged once to the budget for held versions, from its first hold
// until its last one ends. Versions share the storages that no mutation between them replaced; tied
// names and non-persistent buffers count by their owner. So a hold may cost less than the module,
// or nothing.
//
// Safe for steps: a hold is also refused when the module's device could then have no room for a
// step (HoldAdmission has the formula).
//
// The first hold of a version and its end take time in proportion to its tensors; a further hold of
// it is a look-up. A publish walks the tensors only while something is held. Thread-safe. The lock
// is short but not free: a publish takes it too, so a step may wait for holds that begin and end.
// `swap` in Publish runs under it, so a lock that it takes must not be held around a call to this
// class. No storage ends under the lock.
class HoldLedger : public std::enable_shared_from_this<HoldLedger> {
 public:
  // REQUIRES: no storage of the module is also one of another module. `module` is for messages.
  HoldLedger(std::string module, std::shared_ptr<MemoryBudget> budget, VersionRef current);

  // Holds the current version; null after Close. RESOURCE_EXHAUSTED SNAPSHOT_LIMIT, with nothing
  // changed.
  absl::StatusOr<Snapshot> Hold();
  // The same for the version of that number, where it is current or somebody holds it; else null.
  absl::StatusOr<Snapshot> HoldNumber(uint64_t number);
  // The same for the current version together with `state`, the optimizer state as of the last
  // Publish: a hold of its own that nobody else shares. On the strand of the module.
  absl::StatusOr<Snapshot> HoldWith(const OptimizerState& state);
  // Holds some storages of the optimizer state as of the last Publish, and no version. Charged and
  // refused as the others are; null after Close. On the strand.
  absl::StatusOr<std::shared_ptr<const HeldVersion>> HoldSlots(std::vector<StorageRef> slots);

  // Whether that version is current or somebody holds it; false after Close. A look-up, and true
  // for as long as it takes.
  bool IsHeld(uint64_t number) const;

  // Makes `next` the current version. `state` is the optimizer state from now on, `demand` what the
  // next steps take. `swap` is called in the same act, so that whoever sees `next` elsewhere also
  // holds it here. On the strand.
  void Publish(VersionRef next, const OptimizerState& state, const StepDemand& demand,
               absl::FunctionRef<void()> swap) ABSL_LOCKS_EXCLUDED(mutex_);
  // There will be no further version: nothing is promised any more. What is held stays held.
  void Close();

 private:
  friend class HeldVersion;

  struct Held {
    VersionRef version;
    uint64_t holds = 0;  // HeldVersions that live
    std::weak_ptr<const HeldVersion> shared;
  };

  absl::StatusOr<Snapshot> HoldLocked(VersionRef version, std::vector<StorageRef> also)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::shared_ptr<const HeldVersion>> HoldNew(VersionRef version,
                                                             std::vector<StorageRef> also)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // `new_bytes` of held storages more, counted already.
  absl::Status Charge(uint64_t new_bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Count one more, or one fewer, HeldVersion; bytes of the storages that are newly held, or held
  // no more.
  uint64_t Add(const VersionRef& version, const std::vector<StorageRef>& also)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  uint64_t Remove(const VersionRef& version, const std::vector<StorageRef>& also)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Bytes of what is current and held.
  uint64_t Promised() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void End(const HeldVersion& held);

  const std::string module_;
  const std::shared_ptr<MemoryBudget> budget_;

  mutable absl::Mutex mutex_;
  VersionRef current_ ABSL_GUARDED_BY(mutex_);  // null after Close
  std::map<uint64_t, Held> held_ ABSL_GUARDED_BY(mutex_);
  // Optimizer state that is current and held. The pointers are good: who holds has references.
  absl::flat_hash_map<const TensorStorage*, uint64_t> promised_slots_ ABSL_GUARDED_BY(mutex_);
  uint64_t promised_slot_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  MemoryBudget::Reservation charged_ ABSL_GUARDED_BY(mutex_);
  std::optional<HoldAdmission::Account> account_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_HOLD_LEDGER_H_
