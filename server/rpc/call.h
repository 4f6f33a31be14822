#ifndef MODELSTATE_SERVER_RPC_CALL_H_
#define MODELSTATE_SERVER_RPC_CALL_H_

#include <google/protobuf/message.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/base/ref_counted.h"
#include "server/rpc/runtime.h"

namespace modelstate {

class Call;
class CallQueues;

// What is done in one call: the base of unary calls (UnaryCall), streams to the caller
// (ServerStreamHandler) and streams from it. Made when the call arrives; the call holds a reference
// until it is over. All On... are called by the thread of the call's queue, which they do not
// block.
class CallHandler : public RefCounted<CallHandler> {
 public:
  virtual ~CallHandler() = default;

  // The next message, asked for by Call::Read; valid until the next Read.
  virtual void OnMessage(grpc::ByteBuffer* message) = 0;
  // Asked for as well, but there is none: the caller has closed its side, or has gone (who can
  // tell: what is not complete by now counts for nothing either way).
  virtual void OnEnd() = 0;
  // The message of Call::Write has left; false: it never will, the caller has gone.
  virtual void OnWritten(bool) {}
  // The caller has gone, or the call was cut off.
  virtual void OnGone() {}
  // After all others: the call is over.
  virtual void OnOver() {}

 private:
  friend class Call;
  // Here, and so given back last: the call counts as running for as long as anybody works on it.
  CallToken token_;
};

// One call of any kind, with messages as bytes, on a completion queue whose only thread polls,
// parses and copies. Received bytes stay in that thread's cache: with gRPC's callback API its own
// threads poll too, and bytes that one of them has read are copied by another
// (docs/adr/0006-one-kind-of-call.md has the figures).
class Call {
 public:
  struct Method {
    std::string path;  // "/package.Service/Method"
    // Counted as running, refused while the server drains, and cut off when its peer stalls. Not so
    // health and reflection.
    bool admitted = true;
    // Called when a call has arrived; its first message is asked for next.
    std::function<RefPtr<CallHandler>(Call*)> make_handler;
  };

  // From any thread. One Read and one Write at a time; each is answered once, by OnMessage or
  // OnEnd, and by OnWritten.
  void Read();
  void Write(const grpc::ByteBuffer& message);
  // From any thread, once, and nothing after it: with no Write (and for an error no Read) under
  // way.
  void Finish(const absl::Status& status);
  void FinishWith(const grpc::ByteBuffer& last_message);  // and OK

  // What became of a caller that is gone.
  absl::Status GoneStatus() const;

 private:
  friend class CallQueues;
  enum class Op { kAccept, kRead, kWrite, kFinish, kDone };
  struct Tag {
    Call* call;
    Op op;
  };

  // Waits for a call on that one of the queues.
  Call(CallQueues* queues, size_t queue);
  ~Call();
  void OnEvent(Op op, bool ok);
  void OnAccepted();
  void OnRead(bool ok);
  void EndPart();

  CallQueues& queues_;
  const size_t queue_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  Tag accept_tag_{this, Op::kAccept};
  Tag read_tag_{this, Op::kRead};
  Tag write_tag_{this, Op::kWrite};
  Tag finish_tag_{this, Op::kFinish};
  Tag done_tag_{this, Op::kDone};
  int parts_to_end_ = 2;               // kFinish and kDone
  std::shared_ptr<StallWatch> watch_;  // null where the method is not admitted
  grpc::ByteBuffer message_;
  RefPtr<CallHandler> handler_;
};

// INVALID_FIELD where the bytes are no such message.
absl::Status ParseRequest(grpc::ByteBuffer* bytes, google::protobuf::Message* request);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_CALL_H_
