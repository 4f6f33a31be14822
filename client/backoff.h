#ifndef MODELSTATE_CLIENT_BACKOFF_H_
#define MODELSTATE_CLIENT_BACKOFF_H_

#include <limits>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/client.h"

namespace modelstate::client {

// The waits between attempts of one call. Thread-compatible.
class Backoff {
 public:
  explicit Backoff(const ClientOptions& options)
      : initial_(options.initial_backoff),
        max_(options.max_backoff),
        max_attempts_(options.max_attempts),
        delay_(initial_) {}
  // As often as it takes, for so long.
  Backoff(absl::Duration initial, absl::Duration max, absl::Duration patience)
      : initial_(initial),
        max_(max),
        patience_(patience),
        deadline_(absl::Now() + patience),
        delay_(initial) {}

  // After a failure: whether to try again, and if so waits first (returns early when cancelled).
  bool WaitBeforeRetry(const absl::Status& status, Cancellation* cancellation = nullptr);
  // The same for a failure that the caller takes for transient.
  bool Wait(const absl::Status& status, Cancellation* cancellation);

  // Progress was made: the count of attempts and the patience begin again.
  void Reset() {
    attempts_ = 1;
    deadline_ = absl::Now() + patience_;
    delay_ = initial_;
  }

 private:
  const absl::Duration initial_;
  const absl::Duration max_;
  const int max_attempts_ = std::numeric_limits<int>::max();
  const absl::Duration patience_ = absl::InfiniteDuration();
  absl::Time deadline_ = absl::InfiniteFuture();
  int attempts_ = 1;
  absl::Duration delay_;
};

// Whether `status` says that the same call may succeed later.
bool IsTransient(const absl::Status& status);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_BACKOFF_H_
