#ifndef MODELSTATE_SERVER_RPC_CALL_QUEUES_H_
#define MODELSTATE_SERVER_RPC_CALL_QUEUES_H_

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_builder.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "server/rpc/call.h"
#include "server/rpc/runtime.h"

namespace modelstate {

// The completion queues that all calls run on, with a thread each. Received bytes stay in a
// thread's cache where no other thread polls, so a queue's thread sleeps while it has no call, and
// further queues get calls only when one has several: a lone transfer has the one poller that is
// fastest, and many callers share the work.
class CallQueues {
 public:
  // Before the server is built.
  CallQueues(grpc::ServerBuilder* builder, size_t count);
  // REQUIRES: Stop was called, or Start was not.
  ~CallQueues();

  // After the server was built: begins to accept calls. `runtime` outlives this.
  void Start(Runtime* runtime, std::vector<Call::Method> methods);
  // After the server was shut down: waits until no call is left.
  void Stop();

 private:
  friend class Call;
  // The one call that is waited for is on one queue at a time: after a call on `queue`, on this.
  size_t QueueOfNextCall(size_t queue) const;
  void Poll(size_t queue);

  grpc::AsyncGenericService service_;
  Runtime* runtime_ = nullptr;
  absl::flat_hash_map<std::string, Call::Method> methods_;  // by path
  std::vector<std::unique_ptr<grpc::ServerCompletionQueue>> queues_;
  std::vector<std::thread> threads_;
  mutable absl::Mutex mutex_;
  std::vector<int64_t> calls_ ABSL_GUARDED_BY(mutex_);  // by queue, the awaited one as well
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_CALL_QUEUES_H_
