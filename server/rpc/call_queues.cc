#include "server/rpc/call_queues.h"

#include <utility>

namespace modelstate {

CallQueues::CallQueues(grpc::ServerBuilder* builder, size_t count) {
  builder->RegisterAsyncGenericService(&service_);
  for (size_t i = 0; i < count; ++i) queues_.push_back(builder->AddCompletionQueue());
}

CallQueues::~CallQueues() {
  if (!threads_.empty()) return;
  for (auto& queue : queues_) {
    queue->Shutdown();
    Poll(queue.get());
  }
}

void CallQueues::Start(Runtime* runtime, std::vector<Call::Method> methods) {
  runtime_ = runtime;
  for (Call::Method& method : methods) {
    std::string path = method.path;
    methods_.emplace(std::move(path), std::move(method));
  }
  for (auto& queue : queues_) {
    new Call(this, queue.get());
    threads_.emplace_back([queue = queue.get()] { Poll(queue); });
  }
}

void CallQueues::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(
        +[](int64_t* calls) { return *calls == 0; }, &calls_));
  }
  for (auto& queue : queues_) queue->Shutdown();
  for (std::thread& thread : threads_) thread.join();
}

void CallQueues::Poll(grpc::ServerCompletionQueue* queue) {
  void* tag = nullptr;
  bool ok = false;
  while (queue->Next(&tag, &ok)) {
    const Call::Tag event = *static_cast<Call::Tag*>(tag);
    event.call->OnEvent(event.op, ok);
  }
}

}  // namespace modelstate
