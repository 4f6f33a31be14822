#include "client/raw_call.h"

#include "absl/strings/str_cat.h"

namespace modelstate::client {

RawCall::RawCall(const Connection& connection, const std::string& method,
                 Cancellation* cancellation)
    : cancellation_scope_(cancellation, &context_), stub_(connection.channel()) {
  stream_ =
      stub_.PrepareCall(&context_, absl::StrCat("/modelstate.v1.ModelState/", method), &queue_);
  stream_->StartCall(this);
  Wait();  // a failure shows again in the first Write or Read
}

RawCall::~RawCall() {
  if (!finished_) {
    context_.TryCancel();
    (void)Finish();
  }
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

bool RawCall::Wait() {
  void* tag = nullptr;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

bool RawCall::Write(const grpc::ByteBuffer& message) {
  stream_->Write(message, this);
  return Wait();
}

bool RawCall::WritesDone() {
  stream_->WritesDone(this);
  return Wait();
}

bool RawCall::Read(grpc::ByteBuffer* message) {
  stream_->Read(message, this);
  return Wait();
}

absl::Status RawCall::Finish() {
  grpc::Status status;
  stream_->Finish(&status, this);
  Wait();
  finished_ = true;
  return FromGrpcStatus(status);
}

}  // namespace modelstate::client
