#include "server/rpc/stall_watch.h"

#include <utility>
#include <vector>

#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr char kStalledText[] =
    "STREAM_STALLED: the peer took or sent nothing for the server's --stream_stall_timeout; read "
    "(or write) without such pauses, or pin the snapshot and fetch it in ranges";

}  // namespace

StallWatch::StallWatch(grpc_call* call) : call_(call) { grpc_call_ref(call_); }

StallWatch::~StallWatch() { grpc_call_unref(call_); }

void StallWatch::Arm() {
  waiting_since_.store(absl::ToUnixNanos(absl::Now()), std::memory_order_relaxed);
}

absl::Status StallWatch::Error() { return MakeError(Reason::kStreamStalled, kStalledText); }

void StallWatch::EndIfStalled(absl::Time now, absl::Duration timeout) {
  const int64_t since = waiting_since_.load(std::memory_order_relaxed);
  if (since == 0 || now - absl::FromUnixNanos(since) < timeout) return;
  if (stalled_.exchange(true)) return;
  // An orderly status would queue behind the data that the peer does not take. This one goes
  // around it, but cannot carry details: hence the reason's name in the text.
  grpc_call_cancel_with_status(call_, GRPC_STATUS_ABORTED, kStalledText, nullptr);
}

StallSweeper::StallSweeper(absl::Duration timeout, absl::Duration period,
                           std::function<void()> chore)
    : timeout_(timeout), chore_(std::move(chore)), thread_([this, period] { Run(period); }) {}

StallSweeper::~StallSweeper() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

std::shared_ptr<StallWatch> StallSweeper::Watch(grpc_call* call) {
  auto watch = std::make_shared<StallWatch>(call);
  absl::MutexLock lock(&mutex_);
  watches_.push_back(watch);
  return watch;
}

void StallSweeper::Run(absl::Duration period) {
  for (;;) {
    std::vector<std::shared_ptr<StallWatch>> live;
    {
      absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), period)) return;
      for (auto it = watches_.begin(); it != watches_.end();) {
        if (std::shared_ptr<StallWatch> watch = it->lock()) {
          live.push_back(std::move(watch));
          ++it;
        } else {
          it = watches_.erase(it);
        }
      }
    }
    const absl::Time now = absl::Now();
    for (const auto& watch : live) watch->EndIfStalled(now, timeout_);
    live.clear();
    chore_();
  }
}

}  // namespace modelstate
