// What of ModuleInstance keeps versions for readers.
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"

namespace modelstate {

absl::StatusOr<Snapshot> ModuleInstance::Hold() {
  absl::MutexLock lock(&mutex_);
  return HoldLocked(current_);
}

absl::StatusOr<Snapshot> ModuleInstance::HoldNumber(uint64_t number) {
  absl::MutexLock lock(&mutex_);
  if (number == current_->version.number || deleted_) return HoldLocked(current_);
  const auto it = held_.find(number);
  std::shared_ptr<const HeldVersion> held = it == held_.end() ? nullptr : it->second.lock();
  if (held != nullptr) return Snapshot(std::move(held));
  return MakeError(Reason::kSnapshotNotFound,
                   absl::StrCat("module \"", name_, "\": version ", number,
                                " is not held by anybody; version ", current_->version.number,
                                " is current; pin what is to be read later (PinSnapshot)"),
                   {{"module", name_},
                    {"version", absl::StrCat(number)},
                    {"current", absl::StrCat(current_->version.number)}});
}

absl::StatusOr<Snapshot> ModuleInstance::HoldLocked(const VersionRef& version) {
  if (deleted_) return DeletedError();
  if (version->schema->empty()) return EmptyError();
  const uint64_t number = version->version.number;
  if (const auto it = held_.find(number); it != held_.end()) {
    if (std::shared_ptr<const HeldVersion> held = it->second.lock()) return Snapshot(held);
  }
  std::erase_if(held_, [](const auto& entry) { return entry.second.expired(); });
  absl::StatusOr<MemoryBudget::Reservation> reservation =
      environment_.snapshot_budget->Reserve(version->schema->storage_bytes());
  if (!reservation.ok()) {
    return Annotate(reservation.status(),
                    absl::StrCat("module \"", name_, "\": cannot hold version ", number));
  }
  auto held = std::make_shared<const HeldVersion>(HeldVersion{version, *std::move(reservation)});
  held_[number] = held;
  return Snapshot(std::move(held));
}

absl::StatusOr<CapturedState> ModuleInstance::CaptureOnStrand() {
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, Hold());
  return CapturedState{name_, std::move(snapshot), optimizer(), optimizer_state_, workers_};
}

}  // namespace modelstate
