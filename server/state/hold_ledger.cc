#include "server/state/hold_ledger.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/base/status.h"
#include "server/device/device.h"

namespace modelstate {
namespace {

absl::Status NoRoomForSteps(absl::string_view device, const HoldAdmission::Refusal& refusal) {
  return WithRetryAfter(
      MakeError(Reason::kSnapshotLimit,
                absl::StrCat("device ", device, " could then have no room for a training step: ",
                             refusal.used_bytes, " bytes are in use, ", refusal.promised_bytes,
                             " more come with what is held and with optimizer state, a step takes ",
                             refusal.step_bytes, ", and the limit is ", refusal.limit_bytes,
                             "; try again later, release snapshots, or raise the server's "
                             "--device_memory_bytes"),
                {{"device", std::string(device)},
                 {"used_bytes", absl::StrCat(refusal.used_bytes)},
                 {"promised_bytes", absl::StrCat(refusal.promised_bytes)},
                 {"step_bytes", absl::StrCat(refusal.step_bytes)},
                 {"limit_bytes", absl::StrCat(refusal.limit_bytes)},
                 {"flag", "--device_memory_bytes"}}),
      absl::Seconds(1));
}

// Calls `f` with every storage of the version, once each where no two tensors share one.
template <typename F>
void ForEachStorage(const ModuleVersion& version, F f) {
  const ModuleSchema& schema = *version.schema;
  for (uint32_t i = 0; i < schema.size(); ++i) {
    if (schema.owner(i) == i) f(*version.storages[i]);
  }
}

template <typename F>
void ForEachSlot(const OptimizerState& state, F f) {
  for (const ParameterState& parameter : state.parameters) {
    for (const RefPtr<TensorStorage>& slot : parameter.slots) {
      if (slot) f(slot);
    }
  }
}

}  // namespace

HeldVersion::~HeldVersion() { ledger_->End(*this); }

HoldLedger::HoldLedger(std::string module, std::shared_ptr<MemoryBudget> budget, VersionRef current)
    : module_(std::move(module)), budget_(std::move(budget)), current_(std::move(current)) {
  account_.emplace(current_->device->holds());
}

absl::StatusOr<Snapshot> HoldLedger::Hold() {
  absl::MutexLock lock(&mutex_);
  if (current_ == nullptr) return Snapshot();
  return HoldLocked(current_, {});
}

absl::StatusOr<Snapshot> HoldLedger::HoldNumber(uint64_t number) {
  absl::MutexLock lock(&mutex_);
  if (current_ != nullptr && current_->version.number == number) return HoldLocked(current_, {});
  const auto it = held_.find(number);
  if (current_ == nullptr || it == held_.end()) return Snapshot();
  return HoldLocked(it->second.version, {});
}

absl::StatusOr<Snapshot> HoldLedger::HoldWith(const OptimizerState& state) {
  std::vector<StorageRef> slots;
  ForEachSlot(state, [&slots](const RefPtr<TensorStorage>& slot) { slots.push_back(slot); });
  absl::MutexLock lock(&mutex_);
  if (current_ == nullptr) return Snapshot();
  return HoldLocked(current_, std::move(slots));
}

absl::StatusOr<std::shared_ptr<const HeldVersion>> HoldLedger::HoldSlots(
    std::vector<StorageRef> slots) {
  absl::MutexLock lock(&mutex_);
  if (current_ == nullptr) return nullptr;
  return HoldNew(nullptr, std::move(slots));
}

bool HoldLedger::IsHeld(uint64_t number) const {
  absl::MutexLock lock(&mutex_);
  return current_ != nullptr && (current_->version.number == number || held_.contains(number));
}

absl::StatusOr<Snapshot> HoldLedger::HoldLocked(VersionRef version, std::vector<StorageRef> also) {
  const uint64_t number = version->version.number;
  const bool shared = also.empty();
  if (shared) {
    const auto it = held_.find(number);
    std::shared_ptr<const HeldVersion> held =
        it == held_.end() ? nullptr : it->second.shared.lock();
    if (held != nullptr) return Snapshot(std::move(held));
  }
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const HeldVersion> held,
                      HoldNew(std::move(version), std::move(also)));
  if (shared) held_[number].shared = held;
  return Snapshot(std::move(held));
}

absl::StatusOr<std::shared_ptr<const HeldVersion>> HoldLedger::HoldNew(
    VersionRef version, std::vector<StorageRef> also) {
  const uint64_t new_bytes = Add(version, also);
  if (absl::Status charged = Charge(new_bytes); !charged.ok()) {
    Remove(version, also);
    const std::string what = version == nullptr
                                 ? "optimizer state"
                                 : absl::StrCat("version ", version->version.number,
                                                also.empty() ? "" : " with its optimizer state");
    return Annotate(charged, absl::StrCat("module \"", module_, "\": cannot hold ", what));
  }
  return std::make_shared<const HeldVersion>(std::move(version), std::move(also),
                                             shared_from_this());
}

absl::Status HoldLedger::Charge(uint64_t new_bytes) {
  if (new_bytes == 0) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(MemoryBudget::Reservation reservation, budget_->Reserve(new_bytes));
  // Nothing that is newly held is in an old version: those are here because somebody holds them.
  if (std::optional<HoldAdmission::Refusal> refusal = account_->AdmitHeld(Promised())) {
    return NoRoomForSteps(current_->device->name(), *refusal);
  }
  charged_.Merge(std::move(reservation));
  return absl::OkStatus();
}

uint64_t HoldLedger::Add(const VersionRef& version, const std::vector<StorageRef>& also) {
  uint64_t bytes = 0;
  if (version != nullptr) {
    ForEachStorage(*version, [&bytes](const TensorStorage& storage) {
      if (storage.holds_++ == 0) bytes += storage.size();
    });
  }
  for (const StorageRef& slot : also) {
    if (slot->holds_++ > 0) continue;
    bytes += slot->size();
    promised_slots_.emplace(slot.get(), slot->size());
    promised_slot_bytes_ += slot->size();
  }
  if (version == nullptr) return bytes;
  Held& held = held_[version->version.number];
  if (held.holds++ == 0) {
    held.version = version;
    version->device->holds()->AddHeldVersion();
  }
  return bytes;
}

uint64_t HoldLedger::Remove(const VersionRef& version, const std::vector<StorageRef>& also) {
  uint64_t bytes = 0;
  if (version != nullptr) {
    ForEachStorage(*version, [&bytes](const TensorStorage& storage) {
      if (--storage.holds_ == 0) bytes += storage.size();
    });
  }
  for (const StorageRef& slot : also) {
    if (--slot->holds_ > 0) continue;
    bytes += slot->size();
    if (promised_slots_.erase(slot.get()) != 0) promised_slot_bytes_ -= slot->size();
  }
  if (version == nullptr) return bytes;
  const auto it = held_.find(version->version.number);
  if (--it->second.holds == 0) {
    version->device->holds()->RemoveHeldVersion();
    held_.erase(it);  // not the last reference: who ends the hold has one
  }
  return bytes;
}

uint64_t HoldLedger::Promised() const {
  if (held_.empty()) return promised_slot_bytes_;
  if (held_.contains(current_->version.number)) {
    return current_->schema->storage_bytes() + promised_slot_bytes_;
  }
  // Older versions share storages with the current one.
  uint64_t bytes = promised_slot_bytes_;
  ForEachStorage(*current_, [&bytes](const TensorStorage& storage) {
    if (storage.holds_ > 0) bytes += storage.size();
  });
  return bytes;
}

void HoldLedger::End(const HeldVersion& held) {
  absl::MutexLock lock(&mutex_);
  charged_.Shrink(Remove(held.version_, held.also_));
  if (account_) account_->SetHeld(Promised());
}

void HoldLedger::Publish(VersionRef next, const OptimizerState& state, const StepDemand& demand,
                         absl::FunctionRef<void()> swap) {
  VersionRef before = std::move(next);  // ends after the lock
  absl::MutexLock lock(&mutex_);
  swap();
  if (current_ == nullptr) return;
  current_.swap(before);
  if (before->device != current_->device) account_.emplace(current_->device->holds());
  if (!promised_slots_.empty()) {
    promised_slots_.clear();
    promised_slot_bytes_ = 0;
    ForEachSlot(state, [this](const RefPtr<TensorStorage>& slot) ABSL_NO_THREAD_SAFETY_ANALYSIS {
      if (slot->holds_ == 0) return;
      promised_slots_.emplace(slot.get(), slot->size());
      promised_slot_bytes_ += slot->size();
    });
  }
  account_->Set(Promised(), demand);
}

void HoldLedger::Close() {
  VersionRef last;  // ends after the lock
  absl::MutexLock lock(&mutex_);
  last.swap(current_);
  account_.reset();
  promised_slots_.clear();
  promised_slot_bytes_ = 0;
}

}  // namespace modelstate
