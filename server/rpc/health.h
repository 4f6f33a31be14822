#ifndef MODELSTATE_SERVER_RPC_HEALTH_H_
#define MODELSTATE_SERVER_RPC_HEALTH_H_

#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpc/health/v1/health.pb.h"
#include "server/rpc/call.h"
#include "server/rpc/server_stream_handler.h"

namespace modelstate {

// grpc.health.v1.Health: https://github.com/grpc/grpc/blob/master/doc/health-checking.md. The
// server itself has the name "". Thread-safe; outlives its calls.
class Health {
 public:
  using Status = grpc::health::v1::HealthCheckResponse::ServingStatus;

  std::vector<Call::Method> methods();

  void SetServing(const std::string& service, bool serving);
  // Nothing serves any more, whatever is set later.
  void Shutdown();

  // SERVICE_UNKNOWN for a name that was never set.
  Status Get(const std::string& service) const;

  // `watcher` is woken by each change, until Leave.
  void Join(ServerStreamHandler* watcher);
  void Leave(ServerStreamHandler* watcher);

 private:
  void WakeAll();

  mutable absl::Mutex mutex_;
  std::map<std::string, bool> serving_ ABSL_GUARDED_BY(mutex_) = {{"", true}};
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<ServerStreamHandler*> watchers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_HEALTH_H_
