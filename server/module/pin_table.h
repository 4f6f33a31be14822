#ifndef MODELSTATE_SERVER_MODULE_PIN_TABLE_H_
#define MODELSTATE_SERVER_MODULE_PIN_TABLE_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/module/module_instance.h"

namespace modelstate {

// Versions held under leases. A lease is never ended before its time but by Release or the deletion
// of its module. Thread-safe.
class PinTable {
 public:
  struct Pin {
    std::string id;  // 32 hex digits, not to be guessed
    std::shared_ptr<ModuleInstance> module;
    Snapshot snapshot;
    std::shared_ptr<const CapturedState> optimizer;  // held with it; null: pinned without
    absl::Time expire_time;
  };

  static constexpr size_t kMaxPins = 10'000;

  PinTable(std::function<absl::Time()> clock, absl::Duration max_lease)
      : clock_(std::move(clock)), max_lease_(max_lease) {}

  // INVALID_FIELD for a lease that is not in (0, max_lease]; SNAPSHOT_LIMIT beyond kMaxPins, to
  // retry when the first lease ends; else the errors of ModuleInstance::Hold. `optimizer`: what was
  // held with HoldWithOptimizer, instead of the current version.
  absl::StatusOr<Pin> Create(const std::shared_ptr<ModuleInstance>& module, absl::Duration lease,
                             std::optional<CapturedState> optimizer = std::nullopt);
  // From now; never earlier than it would end anyway. SNAPSHOT_NOT_FOUND.
  absl::StatusOr<Pin> Renew(absl::string_view id, absl::Duration lease);
  absl::StatusOr<Pin> Find(absl::string_view id);
  absl::Status Release(absl::string_view id);
  void ReleaseModule(const ModuleInstance& module);

  // Ends the leases that are over, at the cost of those alone. Also done by every call above; call
  // it now and then, so that an idle server gives memory back.
  void ExpireDue();

  absl::Duration max_lease() const { return max_lease_; }
  size_t size() const;

 private:
  const std::function<absl::Time()> clock_;
  const absl::Duration max_lease_;
  mutable absl::Mutex mutex_;
  using Pins = std::map<std::string, Pin, std::less<>>;
  Pin TakeOut(Pins::iterator it) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckRoom(absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Pins pins_ ABSL_GUARDED_BY(mutex_);
  std::set<std::pair<absl::Time, std::string>> by_expiry_ ABSL_GUARDED_BY(mutex_);  // ids
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_PIN_TABLE_H_
