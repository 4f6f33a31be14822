#include "server/device/hold_admission.h"

#include <utility>

namespace modelstate {

HoldAdmission::Account::Account(std::shared_ptr<HoldAdmission> admission)
    : admission_(std::move(admission)) {
  absl::MutexLock lock(&admission_->mutex_);
  admission_->steps_.insert(0);
}

HoldAdmission::Account::~Account() {
  absl::MutexLock lock(&admission_->mutex_);
  admission_->promised_ -= held_ + demand_.new_state_bytes;
  admission_->steps_.erase(admission_->steps_.find(demand_.staged_bytes));
}

void HoldAdmission::Account::Set(uint64_t held_bytes, const StepDemand& demand) {
  absl::MutexLock lock(&admission_->mutex_);
  admission_->promised_ += held_bytes + demand.new_state_bytes;
  admission_->promised_ -= held_ + demand_.new_state_bytes;
  if (demand.staged_bytes != demand_.staged_bytes) {
    admission_->steps_.erase(admission_->steps_.find(demand_.staged_bytes));
    admission_->steps_.insert(demand.staged_bytes);
  }
  held_ = held_bytes;
  demand_ = demand;
}

std::optional<HoldAdmission::Refusal> HoldAdmission::Account::AdmitHeld(uint64_t held_bytes) {
  absl::MutexLock lock(&admission_->mutex_);
  const uint64_t promised = admission_->promised_ + held_bytes - held_;
  const uint64_t step = *admission_->steps_.rbegin();
  if (held_bytes > held_ && step > 0) {
    // Looked at after the promises and under the lock: what becomes a use of memory in between is
    // counted twice, never not at all.
    const BufferPool::Usage usage = admission_->pool_->usage();
    const uint64_t limit = usage.limit_bytes;
    if (usage.used_bytes > limit || promised > limit - usage.used_bytes ||
        step > limit - usage.used_bytes - promised) {
      return Refusal{usage.used_bytes, promised, step, limit};
    }
  }
  admission_->promised_ = promised;
  held_ = held_bytes;
  return std::nullopt;
}

uint64_t HoldAdmission::promised_bytes() const {
  absl::MutexLock lock(&mutex_);
  return promised_;
}

}  // namespace modelstate
