#ifndef MODELSTATE_CLIENT_RAW_CALL_H_
#define MODELSTATE_CLIENT_RAW_CALL_H_

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>

#include <memory>
#include <string>

#include "client/client.h"
#include "client/connection.h"

namespace modelstate::client {

// A streaming call of serialized messages on a completion queue of its own, which the calling
// thread polls: so what is received is copied by the thread that read it from the socket, while it
// is hot. Blocking; thread-compatible. Internal to the library.
class RawCall {
 public:
  // `method` is the RPC's name: "StreamStateDict".
  RawCall(const Connection& connection, const std::string& method, Cancellation* cancellation);
  ~RawCall();
  RawCall(const RawCall&) = delete;
  RawCall& operator=(const RawCall&) = delete;

  // false: the stream is over; Finish says why. A message is handed to gRPC when Write returns,
  // which may still hold its slices.
  bool Write(const grpc::ByteBuffer& message);
  bool WritesDone();
  bool Read(grpc::ByteBuffer* message);

  void Cancel() { context_.TryCancel(); }

  // The status of the call; waits for it. Once.
  absl::Status Finish();

 private:
  bool Wait();

  grpc::ClientContext context_;
  CancellationScope cancellation_scope_;
  grpc::CompletionQueue queue_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  bool finished_ = false;
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_RAW_CALL_H_
