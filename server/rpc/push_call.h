#ifndef MODELSTATE_SERVER_RPC_PUSH_CALL_H_
#define MODELSTATE_SERVER_RPC_PUSH_CALL_H_

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/support/async_stream.h>
#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "server/rpc/runtime.h"

namespace modelstate {

class PushCall;

// What is done with the messages of one client stream. One per call; owned by it. No two of these
// are called at once.
class PushSession {
 public:
  virtual ~PushSession() = default;

  // Takes a message, then calls call->ReadNext() or call->Finish(), now or later.
  virtual void OnMessage(grpc::ByteBuffer* message) = 0;

  // There will be no message: the caller has closed its side, or has gone (who can tell: what is
  // not complete by now counts for nothing either way). Calls call->Finish(), now or later.
  virtual void OnEnd() = 0;
};

// One call of a client stream whose messages are tensor bytes. It runs on a completion queue whose
// only thread polls and copies: that keeps the bytes in the cache (0.9 to 1.1 of raw TCP; the
// callback API hops threads and reaches 0.5 to 0.75).
class PushCall {
 public:
  using Reader = grpc::ServerAsyncReader<grpc::ByteBuffer, grpc::ByteBuffer>;
  // One of the service's methods: how to ask gRPC for a call of it, and what to do with it.
  struct Method {
    std::function<void(grpc::ServerContext*, Reader*, grpc::ServerCompletionQueue*, void* tag)>
        request;
    std::function<std::unique_ptr<PushSession>(PushCall*)> make_session;
  };

  // Waits for a call, serves it and then ends; meanwhile another waits for the next call.
  // `runtime`, `method` and `queue` outlive it.
  static void Accept(Runtime* runtime, const Method* method, grpc::ServerCompletionQueue* queue);

  // From any thread, once for each OnMessage.
  void ReadNext();
  // From any thread, once; the session is called no more. `response` is only sent when OK.
  void Finish(const absl::Status& status, const grpc::ByteBuffer& response = {});

 private:
  friend class PushQueues;
  enum class Op { kAccept, kRead, kFinish };
  struct Tag {
    PushCall* call;
    Op op;
  };

  PushCall(Runtime* runtime, const Method* method, grpc::ServerCompletionQueue* queue);
  void OnEvent(Op op, bool ok);
  void OnAccepted();

  Runtime* const runtime_;
  const Method* const method_;
  grpc::ServerCompletionQueue* const queue_;
  CallToken token_;
  grpc::ServerContext context_;
  Reader reader_{&context_};
  Tag accept_tag_{this, Op::kAccept};
  Tag read_tag_{this, Op::kRead};
  Tag finish_tag_{this, Op::kFinish};
  grpc::ByteBuffer message_;
  std::shared_ptr<StallWatch> watch_;
  std::unique_ptr<PushSession> session_;
};

// The completion queues that push calls run on, with a thread each.
class PushQueues {
 public:
  // Before the server is built.
  PushQueues(grpc::ServerBuilder* builder, size_t count);
  // REQUIRES: Stop was called, or Start was not.
  ~PushQueues();

  // After the server was built: begins to accept calls of `methods`.
  void Start(Runtime* runtime, std::vector<PushCall::Method> methods);
  // After the server was shut down and no call runs any more.
  void Stop();

 private:
  static void Poll(grpc::ServerCompletionQueue* queue);

  std::vector<PushCall::Method> methods_;
  std::vector<std::unique_ptr<grpc::ServerCompletionQueue>> queues_;
  std::vector<std::thread> threads_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_PUSH_CALL_H_
