#include "server/rpc/call_tracker.h"

#include "common/base/status.h"

namespace modelstate {

CallToken::~CallToken() {
  if (tracker_ != nullptr) tracker_->End();
}

absl::Status CallTracker::DrainingError() {
  return WithRetryAfter(
      MakeError(Reason::kDraining, "the server is stopping; try again when it is back"),
      absl::Seconds(1));
}

absl::StatusOr<CallToken> CallTracker::Admit() {
  absl::MutexLock lock(&mutex_);
  if (draining_) return DrainingError();
  ++running_;
  return CallToken(this);
}

void CallTracker::End() {
  absl::MutexLock lock(&mutex_);
  --running_;
}

void CallTracker::BeginDrain() {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
  }
  absl::MutexLock lock(&hooks_mutex_);
  for (const auto& [id, hook] : hooks_) hook();
}

bool CallTracker::draining() const {
  absl::MutexLock lock(&mutex_);
  return draining_;
}

uint64_t CallTracker::running() const {
  absl::MutexLock lock(&mutex_);
  return running_;
}

bool CallTracker::WaitUntilIdle(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ == 0; };
  return mutex_.AwaitWithDeadline(absl::Condition(&idle), deadline);
}

uint64_t CallTracker::AddDrainHook(std::function<void()> hook) {
  absl::MutexLock lock(&hooks_mutex_);
  hooks_.emplace(next_hook_, std::move(hook));
  return next_hook_++;
}

void CallTracker::RemoveDrainHook(uint64_t id) {
  absl::MutexLock lock(&hooks_mutex_);
  hooks_.erase(id);
}

}  // namespace modelstate
