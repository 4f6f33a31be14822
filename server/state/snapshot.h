#ifndef MODELSTATE_SERVER_STATE_SNAPSHOT_H_
#define MODELSTATE_SERVER_STATE_SNAPSHOT_H_

#include <memory>
#include <utility>

#include "server/device/memory_budget.h"
#include "server/state/module_version.h"

namespace modelstate {

// A version that somebody holds: a stream, a pin, a save. Its bytes are counted once against the
// budget for held versions, however many hold it, until the last Snapshot of it ends.
struct HeldVersion {
  VersionRef version;
  MemoryBudget::Reservation reservation;
};

// A consistent state_dict to read from, without a lock and for as long as it lives. A cheap copy
// shares the hold. Reading is thread-safe.
class Snapshot {
 public:
  Snapshot() = default;
  explicit Snapshot(std::shared_ptr<const HeldVersion> held) : held_(std::move(held)) {}

  explicit operator bool() const { return held_ != nullptr; }
  const ModuleVersion& operator*() const { return *held_->version; }
  const ModuleVersion* operator->() const { return held_->version.get(); }

 private:
  std::shared_ptr<const HeldVersion> held_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_SNAPSHOT_H_
