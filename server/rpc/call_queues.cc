#include "server/rpc/call_queues.h"

#include <algorithm>
#include <utility>

namespace modelstate {
namespace {

// A transfer, the watch and the pin that go with it, and the call that is waited for.
constexpr int64_t kCallsBeforeSharing = 4;

}  // namespace

CallQueues::CallQueues(grpc::ServerBuilder* builder, size_t count) : calls_(count) {
  builder->RegisterAsyncGenericService(&service_);
  for (size_t i = 0; i < count; ++i) queues_.push_back(builder->AddCompletionQueue());
}

CallQueues::~CallQueues() {
  if (!threads_.empty()) return;
  Stop();
  for (size_t i = 0; i < queues_.size(); ++i) Poll(i);  // a queue ends empty
}

void CallQueues::Start(Runtime* runtime, std::vector<Call::Method> methods) {
  runtime_ = runtime;
  for (Call::Method& method : methods) {
    std::string path = method.path;
    methods_.emplace(std::move(path), std::move(method));
  }
  for (size_t i = 0; i < queues_.size(); ++i) threads_.emplace_back([this, i] { Poll(i); });
  new Call(this, 0);
}

void CallQueues::Stop() {
  {
    const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
      return std::all_of(calls_.begin(), calls_.end(), [](int64_t calls) { return calls == 0; });
    };
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(&none));
    stopping_ = true;
  }
  for (auto& queue : queues_) queue->Shutdown();
  for (std::thread& thread : threads_) thread.join();
}

size_t CallQueues::QueueOfNextCall(size_t queue) const {
  absl::MutexLock lock(&mutex_);
  if (calls_[queue] < kCallsBeforeSharing) return queue;
  return static_cast<size_t>(std::min_element(calls_.begin(), calls_.end()) - calls_.begin());
}

void CallQueues::Poll(size_t queue) {
  const auto has_work = [this, queue]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return calls_[queue] > 0 || stopping_;
  };
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&has_work));
    }
    void* tag = nullptr;
    bool ok = false;
    if (!queues_[queue]->Next(&tag, &ok)) return;
    const Call::Tag event = *static_cast<Call::Tag*>(tag);
    event.call->OnEvent(event.op, ok);
  }
}

}  // namespace modelstate
