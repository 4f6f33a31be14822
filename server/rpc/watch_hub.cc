#include "server/rpc/watch_hub.h"

#include <time.h>

#include <algorithm>
#include <chrono>

#include "absl/time/time.h"
#include "common/wire/part_codec.h"
#include "modelstate/v1/module.pb.h"
#include "server/rpc/module_convert.h"

namespace modelstate {
namespace {

constexpr int64_t kRestPerWork = 50;
// gRPC sends on threads of its own: about 50 us of them for a message, at most 2.5% of a core.
constexpr int64_t kRestPerMessage = 2'000'000;

int64_t SteadyNanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What this thread has computed. Not the time that passed: a thread that had to wait for a busy
// processor has cost nothing.
int64_t ThreadNanoseconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

std::shared_ptr<const WatchHub::Message> WatchHub::latest() const {
  absl::MutexLock lock(&mutex_);
  return latest_;
}

void WatchHub::Refresh() {
  absl::MutexLock lock(&mutex_);
  const VersionRef current = module_->Current();
  if (latest_ != nullptr && latest_->version == current->version) return;
  v1::WatchModuleResponse response;
  ModuleToProto(*module_, *current, response.mutable_module());
  response.set_last_mutation(static_cast<v1::MutationKind>(current->last_mutation));
  latest_ = std::make_shared<const Message>(Message{current->version, SerializeMessage(response)});
}

WatchFanOut::WatchFanOut() : thread_([this] { Run(); }) {}

WatchFanOut::~WatchFanOut() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    wake_.Signal();
  }
  thread_.join();
}

std::unique_ptr<WatchFanOut::Seat> WatchFanOut::Join(std::shared_ptr<ModuleInstance> module,
                                                     std::function<void()> tell) {
  std::shared_ptr<WatchHub> hub;
  uint64_t id = 0;
  bool first = false;
  {
    absl::MutexLock lock(&mutex_);
    std::shared_ptr<WatchHub>& entry = hubs_[module.get()];
    first = entry == nullptr;
    if (first) entry.reset(new WatchHub(module));
    hub = entry;
    id = next_id_++;
    hub->watchers_.emplace(id, std::make_shared<const std::function<void()>>(std::move(tell)));
  }
  if (first) {
    auto subscription = module->Subscribe([this, hub = hub.get()] { OnChange(hub); });
    {
      absl::MutexLock lock(&mutex_);
      hub->subscription_ = std::move(subscription);
    }
    // Whoever else has joined meanwhile may have missed a version.
    OnChange(hub.get());
  }
  hub->Refresh();
  return std::unique_ptr<Seat>(new Seat(this, std::move(hub), id));
}

WatchFanOut::Seat::~Seat() { fan_out_->Leave(hub_, id_); }

void WatchFanOut::Leave(const std::shared_ptr<WatchHub>& hub, uint64_t id) {
  // Both end without the lock: the one waits for an OnChange, the other may be all of a call.
  std::unique_ptr<ModuleInstance::Subscription> subscription;
  std::shared_ptr<const std::function<void()>> tell;
  absl::MutexLock lock(&mutex_);
  const auto it = hub->watchers_.find(id);
  tell = std::move(it->second);
  hub->watchers_.erase(it);
  if (!hub->watchers_.empty()) return;
  subscription = std::move(hub->subscription_);
  hubs_.erase(hub->module_.get());
  std::erase(changed_, hub);
}

size_t WatchFanOut::hub_count() const {
  absl::MutexLock lock(&mutex_);
  return hubs_.size();
}

void WatchFanOut::OnChange(WatchHub* hub) {
  const bool deleted = hub->module_->deleted();
  absl::MutexLock lock(&mutex_);
  if (hub->watchers_.empty()) return;
  if (deleted) {
    hub->due_ = 0;
  } else if (hub->changed_) {
    return;  // it will be told of this one too
  }
  if (!hub->changed_) changed_.push_back(hub->shared_from_this());
  hub->changed_ = true;
  wake_.Signal();
}

std::shared_ptr<WatchHub> WatchFanOut::NextChanged() {
  const auto it = std::min_element(changed_.begin(), changed_.end(),
                                   [](const auto& a, const auto& b) { return a->due_ < b->due_; });
  return it == changed_.end() ? nullptr : *it;
}

void WatchFanOut::Run() {
  std::vector<std::shared_ptr<const std::function<void()>>> tells;
  absl::MutexLock lock(&mutex_);
  while (!stopping_) {
    std::shared_ptr<WatchHub> hub = NextChanged();
    if (hub == nullptr) {
      wake_.Wait(&mutex_);
      continue;
    }
    const int64_t rest = hub->due_ - SteadyNanoseconds();
    if (rest > 0) {
      wake_.WaitWithTimeout(&mutex_, absl::Nanoseconds(rest));
      continue;
    }
    std::erase(changed_, hub);
    hub->changed_ = false;
    for (const auto& [id, tell] : hub->watchers_) tells.push_back(tell);
    mutex_.Unlock();
    const int64_t begin = ThreadNanoseconds();
    hub->Refresh();
    for (const auto& tell : tells) (*tell)();
    const int64_t messages = static_cast<int64_t>(tells.size());
    tells.clear();
    const int64_t work = ThreadNanoseconds() - begin;
    mutex_.Lock();
    // A deletion during the telling is due at once, whoever sees it first.
    if (!hub->module_->deleted()) {
      hub->due_ = SteadyNanoseconds() + std::max(kRestPerWork * work, kRestPerMessage * messages);
    }
    mutex_.Unlock();
    hub.reset();  // maybe the last reference to all storages of a module
    mutex_.Lock();
  }
}

}  // namespace modelstate
