#ifndef MODELSTATE_SERVER_CHECKPOINT_JOB_PROGRESS_H_
#define MODELSTATE_SERVER_CHECKPOINT_JOB_PROGRESS_H_

#include <algorithm>
#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/checkpoint/checkpoint_job.h"

namespace modelstate {

// Adds up the bytes that a phase of a job is done with and reports them: at its begin, about every
// hundredth of the whole, and at its end; one report at a time. Thread-safe.
class ProgressMeter {
 public:
  // `phase` is a literal.
  ProgressMeter(const JobControl& control, const char* phase, uint64_t total_bytes)
      : control_(control),
        phase_(phase),
        total_(total_bytes),
        step_(std::max<uint64_t>(total_bytes / 100, 64 * 1024)) {
    control_.Report({phase_, 0, total_});
  }

  void Add(uint64_t bytes) {
    absl::MutexLock lock(&mutex_);
    done_ += bytes;
    if (done_ < reported_ + step_ && done_ != total_) return;
    reported_ = done_;
    control_.Report({phase_, done_, total_});
  }

 private:
  const JobControl& control_;
  const char* const phase_;
  const uint64_t total_;
  const uint64_t step_;
  absl::Mutex mutex_;
  uint64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t reported_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_JOB_PROGRESS_H_
