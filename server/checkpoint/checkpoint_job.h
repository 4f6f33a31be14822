#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_JOB_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_JOB_H_

#include <atomic>
#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace modelstate {

struct JobProgress {
  const char* phase = "";  // "queue", "read", "write", "verify", "commit"
  uint64_t done_bytes = 0;
  uint64_t total_bytes = 0;
};

// What a load or save that runs is given by its caller. Jobs block on files: they run on I/O
// threads.
class JobControl {
 public:
  // `report` is called on a job's threads, one call at a time, and must be quick.
  explicit JobControl(absl::FunctionRef<void(const JobProgress&)> report) : report_(report) {}

  void Report(const JobProgress& progress) const { report_(progress); }
  // From any thread; the job stops at its next piece with CANCELLED and leaves nothing behind.
  void Cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  absl::Status CheckNotCancelled() const {
    return cancelled_.load(std::memory_order_relaxed)
               ? absl::CancelledError("the call was cancelled; nothing was changed")
               : absl::OkStatus();
  }

 private:
  absl::FunctionRef<void(const JobProgress&)> report_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_JOB_H_
