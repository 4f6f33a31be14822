#include "server/rpc/push_call.h"

#include <utility>

#include "common/wire/status_mapping.h"

namespace modelstate {

PushCall::PushCall(Runtime* runtime, const Method* method, grpc::ServerCompletionQueue* queue)
    : runtime_(runtime), method_(method), queue_(queue) {}

void PushCall::Accept(Runtime* runtime, const Method* method, grpc::ServerCompletionQueue* queue) {
  auto* call = new PushCall(runtime, method, queue);
  method->request(&call->context_, &call->reader_, queue, &call->accept_tag_);
}

void PushCall::OnAccepted() {
  Accept(runtime_, method_, queue_);
  watch_ = runtime_->stalls->Watch(context_.c_call());
  absl::StatusOr<CallToken> token = runtime_->calls.Admit();
  if (!token.ok()) {
    Finish(token.status());
    return;
  }
  token_ = *std::move(token);
  session_ = method_->make_session(this);
  ReadNext();
}

void PushCall::ReadNext() {
  watch_->Arm();
  reader_.Read(&message_, &read_tag_);
}

void PushCall::Finish(const absl::Status& status, const grpc::ByteBuffer& response) {
  if (status.ok()) {
    reader_.Finish(response, grpc::Status::OK, &finish_tag_);
  } else {
    reader_.FinishWithError(ToGrpcStatus(status), &finish_tag_);
  }
}

void PushCall::OnEvent(Op op, bool ok) {
  switch (op) {
    case Op::kAccept:
      if (ok) {
        OnAccepted();
      } else {
        delete this;  // the server is shutting down
      }
      return;
    case Op::kRead:
      watch_->Disarm();
      if (watch_->stalled()) {
        Finish(StallWatch::Error());
      } else if (ok) {
        session_->OnMessage(&message_);
      } else {
        session_->OnEnd();
      }
      return;
    case Op::kFinish:
      delete this;
      return;
  }
}

PushQueues::PushQueues(grpc::ServerBuilder* builder, size_t count) {
  for (size_t i = 0; i < count; ++i) queues_.push_back(builder->AddCompletionQueue());
}

PushQueues::~PushQueues() {
  if (!threads_.empty()) return;
  for (auto& queue : queues_) {
    queue->Shutdown();
    Poll(queue.get());
  }
}

void PushQueues::Start(Runtime* runtime, std::vector<PushCall::Method> methods) {
  methods_ = std::move(methods);
  for (auto& queue : queues_) {
    for (const PushCall::Method& method : methods_) {
      PushCall::Accept(runtime, &method, queue.get());
    }
    threads_.emplace_back([queue = queue.get()] { Poll(queue); });
  }
}

void PushQueues::Stop() {
  for (auto& queue : queues_) queue->Shutdown();
  for (std::thread& thread : threads_) thread.join();
}

void PushQueues::Poll(grpc::ServerCompletionQueue* queue) {
  void* tag = nullptr;
  bool ok = false;
  while (queue->Next(&tag, &ok)) {
    auto* event = static_cast<PushCall::Tag*>(tag);
    event->call->OnEvent(event->op, ok);
  }
}

}  // namespace modelstate
