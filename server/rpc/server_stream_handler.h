#ifndef MODELSTATE_SERVER_RPC_SERVER_STREAM_HANDLER_H_
#define MODELSTATE_SERVER_RPC_SERVER_STREAM_HANDLER_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/ref_counted.h"
#include "common/wire/status_mapping.h"
#include "server/rpc/runtime.h"

namespace modelstate {

// One call that answers with a stream. The handler is asked for its next message when the last one
// has left (so a slow reader costs one message, or two with Prefetch), and after Wake.
//
// Next and Prefetch are never called by two threads at once. Whoever calls Wake from elsewhere
// holds a RefPtr to the handler: it may be over by then.
template <typename Response>
class ServerStreamHandler : public grpc::ServerWriteReactor<Response>,
                            public RefCounted<ServerStreamHandler<Response>> {
 public:
  virtual ~ServerStreamHandler() = default;

  // Something changed that Next wants to know. From any thread.
  void Wake() {
    RefPtr<ServerStreamHandler> self = Share();
    if (turns_.fetch_add(1) != 0) return;  // whoever is at it takes this turn too
    do {
      TakeTurn();
    } while (turns_.fetch_sub(1) != 1);
  }

 protected:
  ServerStreamHandler(Runtime& runtime, grpc::CallbackServerContext* context)
      : runtime_(runtime), watch_(runtime.stalls->Watch(context->c_call())) {
    absl::StatusOr<CallToken> token = runtime.calls.Admit();
    if (token.ok()) {
      token_ = *std::move(token);
    } else {
      refused_ = token.status();
    }
  }

  enum class Turn {
    kMessage,  // `message` is to be sent
    kWait,     // nothing now; there will be a Wake
    kEnd,      // the call ends with `status`
  };
  // After gone(), the only answers are kWait (while something must first be stopped) and kEnd.
  virtual Turn Next(Response* message, absl::Status* status) = 0;
  // Called while a message is on its way: the time to make the next one.
  virtual void Prefetch() {}
  // The caller has gone. May be called more than once; a Wake follows.
  virtual void OnGone() {}
  // Nothing of this class is called after it, and the call is over.
  virtual void OnOver() {}

  bool gone() const { return gone_.load(std::memory_order_acquire); }
  // What became of a caller that is gone.
  absl::Status GoneStatus() const {
    return watch_->stalled() ? StallWatch::Error() : absl::CancelledError("the caller has gone");
  }

  RefPtr<ServerStreamHandler> Share() {
    this->Ref();
    return RefPtr<ServerStreamHandler>::Adopt(this);
  }

  Runtime& runtime_;

 private:
  void TakeTurn() {
    if (ended_ || writing_.load(std::memory_order_acquire)) return;
    absl::Status status = refused_;
    const Turn turn = refused_.ok() ? Next(&message_, &status) : Turn::kEnd;
    if (turn == Turn::kMessage) {
      writing_.store(true, std::memory_order_release);
      watch_->Arm();
      this->StartWrite(&message_);
      Prefetch();
    } else if (turn == Turn::kEnd) {
      ended_ = true;
      this->Finish(ToGrpcStatus(status));
    }
  }

  void OnWriteDone(bool ok) final {
    watch_->Disarm();
    if (!ok) BecomeGone();
    writing_.store(false, std::memory_order_release);
    Wake();
  }
  void OnCancel() final {
    BecomeGone();
    Wake();
  }
  void BecomeGone() {
    gone_.store(true, std::memory_order_release);
    OnGone();
  }
  void OnDone() final {
    OnOver();
    this->Unref();
  }

  CallToken token_;
  absl::Status refused_;
  const std::shared_ptr<StallWatch> watch_;
  Response message_;
  bool ended_ = false;  // by turns
  std::atomic<uint32_t> turns_{0};
  std::atomic<bool> writing_{false};
  std::atomic<bool> gone_{false};
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_SERVER_STREAM_HANDLER_H_
