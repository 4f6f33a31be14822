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
                                               absl::Duration lease,
                                               std::optional<CapturedState> optimizer) {
  ExpireDue();
  MS_RETURN_IF_ERROR(CheckLease(lease, max_lease_));
  Pin pin;
  if (optimizer) {
    pin.snapshot = optimizer->snapshot;
    pin.optimizer = std::make_shared<const CapturedState>(*std::move(optimizer));
  } else {
    MS_ASSIGN_OR_RETURN(pin.snapshot, module->Hold());
  }
  const absl::Time now = clock_();
  pin.id = absl::StrCat(DigestToHex(RandomUint64()), DigestToHex(RandomUint64()));
  pin.module = module;
  pin.expire_time = now + lease;
  {
    absl::MutexLock lock(&mutex_);
    MS_RETURN_IF_ERROR(CheckRoom(now));
    pins_.emplace(pin.id, pin);
    by_expiry_.emplace(pin.expire_time, pin.id);
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
  Pin& pin = it->second;
  if (expire_time > pin.expire_time) {
    by_expiry_.erase({pin.expire_time, pin.id});
    pin.expire_time = expire_time;
    by_expiry_.emplace(pin.expire_time, pin.id);
  }
  return pin;
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
  released = TakeOut(it);
  return absl::OkStatus();
}

PinTable::Pin PinTable::TakeOut(Pins::iterator it) {
  Pin pin = std::move(it->second);
  by_expiry_.erase({pin.expire_time, it->first});
  pins_.erase(it);
  return pin;
}

absl::Status PinTable::CheckRoom(absl::Time now) const {
  if (pins_.size() < kMaxPins) return absl::OkStatus();
  const absl::Duration wait = std::max(by_expiry_.begin()->first - now, absl::Milliseconds(100));
  return WithRetryAfter(
      MakeError(Reason::kSnapshotLimit,
                absl::StrCat("the server has ", kMaxPins,
                             " snapshots pinned, which is the most it keeps; release those that "
                             "are read (ReleaseSnapshot), pin for shorter leases, or try again "
                             "when the first lease ends"),
                {{"limit", absl::StrCat(kMaxPins)}}),
      wait);
}

size_t PinTable::size() const {
  absl::MutexLock lock(&mutex_);
  return pins_.size();
}

void PinTable::ReleaseModule(const ModuleInstance& module) {
  std::vector<Pin> released;
  absl::MutexLock lock(&mutex_);
  for (auto it = pins_.begin(); it != pins_.end();) {
    const auto pin = it++;
    if (pin->second.module.get() == &module) released.push_back(TakeOut(pin));
  }
}

void PinTable::ExpireDue() {
  const absl::Time now = clock_();
  std::vector<Pin> released;
  absl::MutexLock lock(&mutex_);
  while (!by_expiry_.empty() && by_expiry_.begin()->first <= now) {
    released.push_back(TakeOut(pins_.find(by_expiry_.begin()->second)));
  }
}

}  // namespace modelstate
