#ifndef MODELSTATE_SERVER_RPC_CALL_TRACKER_H_
#define MODELSTATE_SERVER_RPC_CALL_TRACKER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace modelstate {

class CallTracker;

// A call that was let in; it counts as running until this ends. Move-only.
class CallToken {
 public:
  CallToken() = default;
  CallToken(CallToken&& other) noexcept : tracker_(std::exchange(other.tracker_, nullptr)) {}
  CallToken& operator=(CallToken&& other) noexcept {
    std::swap(tracker_, other.tracker_);
    return *this;
  }
  ~CallToken();

 private:
  friend class CallTracker;
  explicit CallToken(CallTracker* tracker) : tracker_(tracker) {}
  CallTracker* tracker_ = nullptr;
};

// Counts the calls that run, and refuses new ones once the server drains. Thread-safe; outlives its
// tokens.
class CallTracker {
 public:
  // UNAVAILABLE DRAINING, with a retry hint, after BeginDrain.
  absl::StatusOr<CallToken> Admit();

  // The error of a call that is refused, or ended, because the server stops.
  static absl::Status DrainingError();

  // Refuses new calls from now on, and calls the hooks.
  void BeginDrain();
  bool draining() const;
  uint64_t running() const;

  // True when no call runs any more, false when some still do at `deadline`.
  bool WaitUntilIdle(absl::Time deadline);

  // `hook` is called by BeginDrain, for calls that would not end by themselves. It must be quick.
  // RemoveDrainHook waits for one that is running.
  uint64_t AddDrainHook(std::function<void()> hook);
  void RemoveDrainHook(uint64_t id);

 private:
  friend class CallToken;
  void End();

  mutable absl::Mutex mutex_;
  uint64_t running_ ABSL_GUARDED_BY(mutex_) = 0;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;

  absl::Mutex hooks_mutex_;
  std::map<uint64_t, std::function<void()>> hooks_ ABSL_GUARDED_BY(hooks_mutex_);
  uint64_t next_hook_ ABSL_GUARDED_BY(hooks_mutex_) = 1;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_CALL_TRACKER_H_
