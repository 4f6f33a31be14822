#include "server/rpc/call.h"

#include <grpcpp/support/proto_buffer_reader.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/status_mapping.h"
#include "server/rpc/call_queues.h"

namespace modelstate {

Call::Call(CallQueues* queues, size_t queue) : queues_(*queues), queue_(queue) {
  {
    absl::MutexLock lock(&queues_.mutex_);
    ++queues_.calls_[queue];
  }
  context_.AsyncNotifyWhenDone(&done_tag_);
  grpc::ServerCompletionQueue* const completions = queues_.queues_[queue].get();
  queues_.service_.RequestCall(&context_, &stream_, completions, completions, &accept_tag_);
}

Call::~Call() {
  absl::MutexLock lock(&queues_.mutex_);
  --queues_.calls_[queue_];
}

void Call::OnAccepted() {
  new Call(&queues_, queues_.QueueOfNextCall(queue_));
  const auto method = queues_.methods_.find(context_.method());
  if (method == queues_.methods_.end()) {
    return Finish(absl::UnimplementedError(absl::StrCat(
        "there is no method ", context_.method(), "; server reflection lists those that are")));
  }
  if (method->second.admitted) {
    absl::StatusOr<CallToken> token = queues_.runtime_->calls.Admit();
    if (!token.ok()) return Finish(token.status());
    watch_ = queues_.runtime_->stalls->Watch(context_.c_call());
    handler_ = method->second.make_handler(this);
    handler_->token_ = *std::move(token);
  } else {
    handler_ = method->second.make_handler(this);
  }
  Read();
}

void Call::Read() {
  // Its memory, which is in the cache, is what the next one is received into.
  message_.Clear();
  if (watch_ != nullptr) watch_->Arm();
  stream_.Read(&message_, &read_tag_);
}

void Call::Write(const grpc::ByteBuffer& message) {
  if (watch_ != nullptr) watch_->Arm();
  stream_.Write(message, &write_tag_);
}

void Call::Finish(const absl::Status& status) {
  stream_.Finish(ToGrpcStatus(status), &finish_tag_);
}

void Call::FinishWith(const grpc::ByteBuffer& last_message) {
  stream_.WriteAndFinish(last_message, grpc::WriteOptions(), grpc::Status::OK, &finish_tag_);
}

absl::Status Call::GoneStatus() const {
  return watch_ != nullptr && watch_->stalled() ? StallWatch::Error()
                                                : absl::CancelledError("the caller has gone");
}

void Call::OnRead(bool ok) {
  if (watch_ != nullptr) {
    watch_->Disarm();
    if (watch_->stalled()) return Finish(StallWatch::Error());
  }
  if (ok) {
    handler_->OnMessage(&message_);
  } else {
    handler_->OnEnd();
  }
}

void Call::OnEvent(Op op, bool ok) {
  switch (op) {
    case Op::kAccept:
      if (ok) {
        OnAccepted();
      } else {
        delete this;  // the server is shutting down
      }
      return;
    case Op::kRead:
      return OnRead(ok);
    case Op::kWrite:
      if (watch_ != nullptr) watch_->Disarm();
      return handler_->OnWritten(ok);
    case Op::kFinish:
      return EndPart();
    case Op::kDone:
      if (context_.IsCancelled() && handler_) handler_->OnGone();
      return EndPart();
  }
}

void Call::EndPart() {
  if (--parts_to_end_ > 0) return;
  if (handler_) handler_->OnOver();
  delete this;
}

absl::Status ParseRequest(grpc::ByteBuffer* bytes, google::protobuf::Message* request) {
  grpc::ProtoBufferReader reader(bytes);
  if (request->ParseFromZeroCopyStream(&reader)) return absl::OkStatus();
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("the request is not a valid ", request->GetDescriptor()->name(),
                                " message; is it made from this server's .proto files?"));
}

}  // namespace modelstate
