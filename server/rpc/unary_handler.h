#ifndef MODELSTATE_SERVER_RPC_UNARY_HANDLER_H_
#define MODELSTATE_SERVER_RPC_UNARY_HANDLER_H_

#include <grpcpp/support/server_callback.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/wire/status_mapping.h"
#include "server/rpc/runtime.h"

namespace modelstate {

// One unary call. Request and response stay valid until Finish, which is called exactly once, from
// any thread; after it the handler is gone.
class UnaryHandler final : public grpc::ServerUnaryReactor {
 public:
  void Finish(const absl::Status& status) {
    grpc::ServerUnaryReactor::Finish(ToGrpcStatus(status));
  }

  // Answers with what `work() -> absl::Status` returns, in this thread: for what only looks.
  template <typename Work>
  static grpc::ServerUnaryReactor* AnswerNow(Runtime& runtime, Work&& work) {
    return Start(runtime, [&](UnaryHandler* call) { call->Finish(work()); });
  }

  // The same on an I/O thread. `work` copies or borrows nothing but request, response and runtime.
  template <typename Work>
  static grpc::ServerUnaryReactor* AnswerOnIoThread(Runtime& runtime, Work work) {
    return Start(runtime, [&](UnaryHandler* call) {
      runtime.PostIo([call, work = std::move(work)]() mutable { call->Finish(work()); });
    });
  }

  // `work(call) -> absl::Status` starts something that calls call->Finish later, or else returns
  // why it did not.
  template <typename Work>
  static grpc::ServerUnaryReactor* AnswerLater(Runtime& runtime, Work&& work) {
    return Start(runtime, [&](UnaryHandler* call) {
      if (absl::Status status = work(call); !status.ok()) call->Finish(status);
    });
  }

 private:
  explicit UnaryHandler(CallToken token) : token_(std::move(token)) {}
  void OnDone() override { delete this; }

  template <typename Body>
  static grpc::ServerUnaryReactor* Start(Runtime& runtime, Body&& body) {
    absl::StatusOr<CallToken> token = runtime.calls.Admit();
    auto* call = new UnaryHandler(token.ok() ? *std::move(token) : CallToken());
    if (token.ok()) {
      body(call);
    } else {
      call->Finish(token.status());
    }
    return call;
  }

  CallToken token_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_UNARY_HANDLER_H_
