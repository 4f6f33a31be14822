#ifndef MODELSTATE_SERVER_RPC_STALL_WATCH_H_
#define MODELSTATE_SERVER_RPC_STALL_WATCH_H_

#include <grpc/grpc.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace modelstate {

// Tells whether one stream's peer still takes or sends anything. Thread-safe.
class StallWatch {
 public:
  // `call` may end before the watch: it is kept, and cancelling one that is over does nothing.
  explicit StallWatch(grpc_call* call);
  ~StallWatch();

  // From now on it is the peer's turn.
  void Arm();
  // The peer has done its part.
  void Disarm() { waiting_since_.store(0, std::memory_order_relaxed); }

  // Whether the call was ended for its stalling.
  bool stalled() const { return stalled_.load(std::memory_order_acquire); }
  // ABORTED STREAM_STALLED.
  static absl::Status Error();

 private:
  friend class StallSweeper;
  void EndIfStalled(absl::Time now, absl::Duration timeout);

  grpc_call* const call_;
  std::atomic<int64_t> waiting_since_{0};  // ns since the Unix epoch; 0: not waiting
  std::atomic<bool> stalled_{false};
};

// One thread that ends the calls whose peers have stalled, and does other things now and then.
class StallSweeper {
 public:
  // `chore` is called about every `period`, after the sweep.
  StallSweeper(absl::Duration timeout, absl::Duration period, std::function<void()> chore);
  ~StallSweeper();

  std::shared_ptr<StallWatch> Watch(grpc_call* call);

 private:
  void Run(absl::Duration period);

  const absl::Duration timeout_;
  const std::function<void()> chore_;
  absl::Mutex mutex_;
  std::list<std::weak_ptr<StallWatch>> watches_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_STALL_WATCH_H_
