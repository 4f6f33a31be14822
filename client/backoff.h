#ifndef MODELSTATE_CLIENT_BACKOFF_H_
#define MODELSTATE_CLIENT_BACKOFF_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/client.h"

namespace modelstate::client {

// The waits between attempts of one call. Thread-compatible.
class Backoff {
 public:
  explicit Backoff(const ClientOptions& options)
      : options_(options), delay_(options.initial_backoff) {}

  // After a failure: whether to try again, and if so waits first (returns early when cancelled).
  bool WaitBeforeRetry(const absl::Status& status, Cancellation* cancellation = nullptr);

  // Progress was made: the count of attempts begins again.
  void Reset() {
    attempts_ = 1;
    delay_ = options_.initial_backoff;
  }

 private:
  const ClientOptions options_;
  int attempts_ = 1;
  absl::Duration delay_;
};

// Whether `status` says that the same call may succeed later.
bool IsTransient(const absl::Status& status);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_BACKOFF_H_
