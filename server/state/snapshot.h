#ifndef MODELSTATE_SERVER_STATE_SNAPSHOT_H_
#define MODELSTATE_SERVER_STATE_SNAPSHOT_H_

#include <memory>
#include <utility>
#include <vector>

#include "server/state/cast_cache.h"
#include "server/state/module_version.h"

namespace modelstate {

class HoldLedger;

// A version that somebody holds: a stream, a pin, a save. Made by a HoldLedger, which counts its
// storages until the last Snapshot of it ends. Immutable but for the casts that it keeps.
class HeldVersion {
 public:
  // REQUIRES: `ledger` has counted it. A null `version` holds `also` alone.
  HeldVersion(VersionRef version, std::vector<StorageRef> also, std::shared_ptr<HoldLedger> ledger)
      : version_(std::move(version)), also_(std::move(also)), ledger_(std::move(ledger)) {}
  HeldVersion(const HeldVersion&) = delete;
  HeldVersion& operator=(const HeldVersion&) = delete;
  ~HeldVersion();

 private:
  friend class HoldLedger;
  friend class Snapshot;
  const VersionRef version_;
  const std::vector<StorageRef> also_;  // optimizer state that is held with it
  const std::shared_ptr<HoldLedger> ledger_;
  mutable CastCache casts_;
};

// A consistent state_dict to read from, without a lock and for as long as it lives. A cheap copy
// shares the hold. Reading is thread-safe.
class Snapshot {
 public:
  Snapshot() = default;
  explicit Snapshot(std::shared_ptr<const HeldVersion> held) : held_(std::move(held)) {}

  explicit operator bool() const { return held_ != nullptr; }
  const ModuleVersion& operator*() const { return *held_->version_; }
  const ModuleVersion* operator->() const { return held_->version_.get(); }
  // Of the tensors of the version, for all that hold it together.
  CastCache& casts() const { return held_->casts_; }

 private:
  std::shared_ptr<const HeldVersion> held_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_SNAPSHOT_H_
