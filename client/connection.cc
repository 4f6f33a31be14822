#include "client/connection.h"

#include <algorithm>
#include <optional>

#include "absl/random/random.h"
#include "absl/time/clock.h"
#include "common/base/status.h"

namespace modelstate::client {

Cancellation::Cancellation(absl::Time deadline) : registry_(std::make_unique<Registry>(deadline)) {}
Cancellation::~Cancellation() = default;
void Cancellation::Cancel() { registry_->Cancel(); }
bool Cancellation::cancelled() const { return registry_->cancelled(); }

void Cancellation::Registry::Cancel() {
  absl::MutexLock lock(&mutex_);
  cancelled_ = true;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
}

bool Cancellation::Registry::cancelled() const {
  absl::MutexLock lock(&mutex_);
  return cancelled_ || absl::Now() >= deadline_;
}

void Cancellation::Registry::Add(grpc::ClientContext* context) {
  if (deadline_ < absl::FromChrono(context->deadline())) {
    context->set_deadline(absl::ToChronoTime(deadline_));
  }
  absl::MutexLock lock(&mutex_);
  contexts_.insert(context);
  // A call that starts after this is cancelled as it starts.
  if (cancelled_) context->TryCancel();
}

void Cancellation::Registry::Remove(grpc::ClientContext* context) {
  absl::MutexLock lock(&mutex_);
  contexts_.erase(context);
}

bool IsTransient(const absl::Status& status) {
  return absl::IsUnavailable(status) || GetRetryAfter(status).has_value();
}

bool Backoff::WaitBeforeRetry(const absl::Status& status, Cancellation* cancellation) {
  return IsTransient(status) && Wait(status, cancellation);
}

bool Backoff::Wait(const absl::Status& status, Cancellation* cancellation) {
  if (attempts_ >= max_attempts_ || absl::Now() >= deadline_) return false;
  ++attempts_;
  absl::BitGen random;
  absl::Duration wait = delay_ * absl::Uniform(random, 0.5, 1.0);
  if (std::optional<absl::Duration> hint = GetRetryAfter(status)) wait = std::max(wait, *hint);
  wait = std::min(wait, max_);
  delay_ = std::min(delay_ * 2, max_);
  const absl::Time end = absl::Now() + wait;
  while (absl::Now() < end) {
    if (cancellation != nullptr && cancellation->cancelled()) return false;
    absl::SleepFor(std::min(end - absl::Now(), absl::Milliseconds(50)));
  }
  return true;
}

}  // namespace modelstate::client
