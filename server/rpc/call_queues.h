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

// The completion queues that all calls run on, with a thread each.
class CallQueues {
 public:
  // Before the server is built. One queue keeps bytes in the cache best; more share the work where
  // there are the cores for it.
  CallQueues(grpc::ServerBuilder* builder, size_t count);
  // REQUIRES: Stop was called, or Start was not.
  ~CallQueues();

  // After the server was built: begins to accept calls. `runtime` outlives this.
  void Start(Runtime* runtime, std::vector<Call::Method> methods);
  // After the server was shut down: waits until no call is left.
  void Stop();

 private:
  friend class Call;
  static void Poll(grpc::ServerCompletionQueue* queue);

  grpc::AsyncGenericService service_;
  Runtime* runtime_ = nullptr;
  absl::flat_hash_map<std::string, Call::Method> methods_;  // by path
  std::vector<std::unique_ptr<grpc::ServerCompletionQueue>> queues_;
  std::vector<std::thread> threads_;
  absl::Mutex mutex_;
  int64_t calls_ ABSL_GUARDED_BY(mutex_) = 0;  // those that are waited for as well
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_CALL_QUEUES_H_
