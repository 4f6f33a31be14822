#include "server/module/pin_table.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/random.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

absl::Status CheckLease(absl::Duration lease, absl::Duration max_lease) {
  if (lease > absl::ZeroDuration() && lease <= max_lease) return absl::OkStatus();
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("lease is ", absl::FormatDuration(lease), "; it must be above 0 and at most ",
                   absl::FormatDuration(max_lease), ": pin again before it ends"),
      {{"field", "lease"}, {"max_lease", absl::FormatDuration(max_lease)}});
}

absl::Status NoSuchPin(absl::string_view id) {
  return MakeError(Reason::kSnapshotNotFound,
                   absl::StrCat("no snapshot \"", id.substr(0, 64),
                                "\": its lease is over, it was released, or its module was "
                                "deleted; pin the module again"),
                   {{"snapshot_id", std::string(id)}});
}

}  // namespace

absl::StatusOr<PinTable::Pin> PinTable::Create(const std::shared_ptr<ModuleInstance>& module,
                                               absl::Duration lease) {
  ExpireDue();
  MS_RETURN_IF_ERROR(CheckLease(lease, max_lease_));
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, module->Hold());
  Pin pin{absl::StrCat(DigestToHex(RandomUint64()), DigestToHex(RandomUint64())), module,
          std::move(snapshot), clock_() + lease};
  {
    absl::MutexLock lock(&mutex_);
    pins_.emplace(pin.id, pin);
  }
  // Its pins may have been released just before this one was there.
  if (module->deleted()) {
    ReleaseModule(*module);
    return module->Hold().status();
  }
  return pin;
}

absl::StatusOr<PinTable::Pin> PinTable::Renew(absl::string_view id, absl::Duration lease) {
  ExpireDue();
  MS_RETURN_IF_ERROR(CheckLease(lease, max_lease_));
  const absl::Time expire_time = clock_() + lease;
  absl::MutexLock lock(&mutex_);
  const auto it = pins_.find(id);
  if (it == pins_.end()) return NoSuchPin(id);
  it->second.expire_time = std::max(it->second.expire_time, expire_time);
  return it->second;
}

absl::StatusOr<PinTable::Pin> PinTable::Find(absl::string_view id) {
  ExpireDue();
  absl::MutexLock lock(&mutex_);
  const auto it = pins_.find(id);
  if (it == pins_.end()) return NoSuchPin(id);
  return it->second;
}

absl::Status PinTable::Release(absl::string_view id) {
  ExpireDue();
  Pin released;  // ends outside of the lock: it may free a whole version
  absl::MutexLock lock(&mutex_);
  const auto it = pins_.find(id);
  if (it == pins_.end()) return NoSuchPin(id);
  released = std::move(it->second);
  pins_.erase(it);
  return absl::OkStatus();
}

size_t PinTable::size() const {
  absl::MutexLock lock(&mutex_);
  return pins_.size();
}

void PinTable::ReleaseModule(const ModuleInstance& module) {
  std::vector<Pin> released;
  absl::MutexLock lock(&mutex_);
  for (auto it = pins_.begin(); it != pins_.end();) {
    if (it->second.module.get() == &module) {
      released.push_back(std::move(it->second));
      it = pins_.erase(it);
    } else {
      ++it;
    }
  }
}

void PinTable::ExpireDue() {
  const absl::Time now = clock_();
  std::vector<Pin> released;
  absl::MutexLock lock(&mutex_);
  for (auto it = pins_.begin(); it != pins_.end();) {
    if (it->second.expire_time <= now) {
      released.push_back(std::move(it->second));
      it = pins_.erase(it);
    } else {
      ++it;
    }
  }
}

}  // namespace modelstate
