#ifndef MODELSTATE_SERVER_RPC_UNARY_CALL_H_
#define MODELSTATE_SERVER_RPC_UNARY_CALL_H_

#include <google/protobuf/message_lite.h>

#include <utility>

#include "absl/status/status.h"
#include "common/wire/part_codec.h"
#include "server/rpc/call.h"

namespace modelstate {

// One unary call. Request and response stay valid until Finish, which is called exactly once, from
// any thread; after it the handler may be gone.
class UnaryCall : public CallHandler {
 public:
  void Finish(const absl::Status& status) {
    if (status.ok()) {
      call_.FinishWith(SerializeMessage(response_message()));
    } else {
      call_.Finish(status);
    }
  }

  // Answers with what `work() -> absl::Status` returns, in this thread: for what only looks.
  template <typename Work>
  void AnswerNow(Work&& work) {
    Finish(work());
  }

  // The same on an I/O thread. `work` copies or borrows nothing but request, response and runtime.
  template <typename Work>
  void AnswerOnIoThread(Work work) {
    runtime_.PostIo([this, work = std::move(work)]() mutable { Finish(work()); });
  }

  // `work() -> absl::Status` starts something that calls Finish later, or else returns why it did
  // not.
  template <typename Work>
  void AnswerLater(Work&& work) {
    if (absl::Status status = work(); !status.ok()) Finish(status);
  }

 protected:
  UnaryCall(Runtime* runtime, Call* call) : runtime_(*runtime), call_(*call) {}

 private:
  // Parses the request and begins to answer it.
  virtual absl::Status Begin(grpc::ByteBuffer* message) = 0;
  virtual const google::protobuf::MessageLite& response_message() const = 0;

  void OnMessage(grpc::ByteBuffer* message) final {
    if (absl::Status status = Begin(message); !status.ok()) call_.Finish(status);
  }
  void OnEnd() final {
    call_.Finish(absl::InvalidArgumentError("the call ended without its request message"));
  }

  Runtime& runtime_;
  Call& call_;
};

// Of `answer(call, request, response)`.
template <typename Request, typename Response, typename Answer>
class UnaryCallOf final : public UnaryCall {
 public:
  UnaryCallOf(Runtime* runtime, Call* call, Answer answer)
      : UnaryCall(runtime, call), answer_(std::move(answer)) {}

 private:
  absl::Status Begin(grpc::ByteBuffer* message) override {
    if (absl::Status status = ParseRequest(message, &request_); !status.ok()) return status;
    answer_(this, &request_, &response_);
    return absl::OkStatus();
  }
  const google::protobuf::MessageLite& response_message() const override { return response_; }

  const Answer answer_;
  Request request_;
  Response response_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_UNARY_CALL_H_
