#ifndef MODELSTATE_SERVER_RPC_SERVER_STREAM_HANDLER_H_
#define MODELSTATE_SERVER_RPC_SERVER_STREAM_HANDLER_H_

#include <grpcpp/support/byte_buffer.h>

#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "common/base/ref_counted.h"
#include "server/rpc/call.h"

namespace modelstate {

// One call that answers one request with a stream. The handler is asked for its next message when
// the last one has left (so a slow reader costs one message, or two with Prefetch), and after Wake.
//
// Next and Prefetch are never called by two threads at once. Whoever calls Wake from elsewhere
// holds a RefPtr to the handler: it may be over by then.
class ServerStreamHandler : public CallHandler {
 public:
  // Something changed that Next wants to know. From any thread.
  void Wake();

 protected:
  explicit ServerStreamHandler(Call* call) : call_(*call) {}

  enum class Turn {
    kMessage,  // `message` is to be sent
    kWait,     // nothing now; there will be a Wake
    kEnd,      // the call ends with `status`
  };
  // Before all others, once; turns begin after it. An error ends the call.
  virtual absl::Status OnRequest(grpc::ByteBuffer* message) = 0;
  // After gone(), the only answers are kWait (while something must first be stopped) and kEnd.
  virtual Turn Next(grpc::ByteBuffer* message, absl::Status* status) = 0;
  // Called while a message is on its way: the time to make the next one.
  virtual void Prefetch() {}
  // The caller has gone. May be called more than once; a Wake follows.
  virtual void OnCallerGone() {}

  bool gone() const { return gone_.load(std::memory_order_acquire); }
  // What became of a caller that is gone.
  absl::Status GoneStatus() const { return call_.GoneStatus(); }

  RefPtr<ServerStreamHandler> Share() {
    Ref();
    return RefPtr<ServerStreamHandler>::Adopt(this);
  }

 private:
  void RunTurns();
  void TakeTurn();
  void BecomeGone();

  void OnMessage(grpc::ByteBuffer* message) final;
  void OnEnd() final;
  void OnWritten(bool ok) final;
  void OnGone() final;

  Call& call_;
  absl::Status refused_;
  bool ended_ = false;  // by turns
  // Turns to take by whoever made it more than 0: at first the one who brings the request.
  std::atomic<uint32_t> turns_{1};
  std::atomic<bool> writing_{false};
  std::atomic<bool> gone_{false};
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_SERVER_STREAM_HANDLER_H_
