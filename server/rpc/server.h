#ifndef MODELSTATE_SERVER_RPC_SERVER_H_
#define MODELSTATE_SERVER_RPC_SERVER_H_

#include <grpcpp/server.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/transport_profile.h"
#include "server/rpc/call_queues.h"
#include "server/rpc/health.h"
#include "server/rpc/runtime.h"
#include "server/rpc/service.h"

namespace modelstate {

// The flags of the same names say what these are. 0 bytes or threads: the default.
struct ServerOptions {
  std::string listen = "localhost:50051";
  std::string checkpoint_root = "./checkpoints";
  std::string device = "auto";         // a list, as MakeDevices takes it
  uint64_t device_memory_bytes = 0;    // of each device: three quarters of its memory
  uint64_t push_memory_bytes = 0;      // half of that
  uint64_t snapshot_memory_bytes = 0;  // half of that
  uint64_t cast_memory_bytes = 0;      // an eighth of it
  uint64_t staging_memory_bytes = 0;   // of each GPU: a part of the host's memory
  uint64_t max_message_bytes = uint64_t{4} << 20;
  uint64_t max_chunk_bytes = uint64_t{2} << 20;
  size_t compute_threads = 0;  // one per hardware thread
  size_t io_threads = 4;
  size_t network_threads = 0;  // one per four hardware threads, at least two
  TransportProfile transport_profile = TransportProfile::kAuto;
  absl::Duration max_lease = absl::Hours(1);
  size_t max_workers = 10'000;  // remembered by each module
  absl::Duration worker_expiry = absl::Hours(24);
  absl::Duration stream_stall_timeout = absl::Seconds(60);
  absl::Duration drain_timeout = absl::Seconds(30);
  bool restore_latest = false;
  SavePeriod save_every;
  RetentionPolicy retention;
  // Where to tell what no call is told; null: nowhere. Any thread.
  std::function<void(absl::LogSeverity, const std::string&)> log;
  // Called once a device has failed, which no server recovers from: it is to be ended. Any thread.
  std::function<void()> on_device_failure;
};

// A model-state server in this process: modelstate.v1.ModelState, health with a status per module,
// and reflection v1 and v1alpha.
class Server {
 public:
  // Listens when it returns. INVALID_ARGUMENT names the option that is wrong; FAILED_PRECONDITION
  // for an address that is taken or a device that is not there.
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServerOptions options);
  // Drain, without waiting for calls that run.
  ~Server();

  // The host as it was given, and the port that was taken.
  const std::string& address() const { return address_; }
  int port() const { return port_; }

  // Refuses new calls with DRAINING and lets running ones end, until drain_timeout; then stops.
  // Returns when no call runs any more.
  void Drain();

  // For a caller in the same process that looks at the state, such as a test.
  Runtime& runtime() { return runtime_; }

  // A channel to this server without a socket.
  std::shared_ptr<grpc::Channel> InProcessChannel(const grpc::ChannelArguments& arguments);

 private:
  explicit Server(ServerOptions options) : options_(std::move(options)) {}
  absl::Status CheckOptions() const;
  absl::Status StartRuntime();
  absl::Status Listen();
  void Stop(absl::Duration grace);
  // Its modules serve no more. Called by whoever finds it out.
  void OnDeviceFailure(Device& device);

  const ServerOptions options_;
  std::string address_;
  int port_ = 0;
  bool stopped_ = false;
  Runtime runtime_;
  std::unique_ptr<ModelStateService> service_;
  Health health_;
  std::unique_ptr<CallQueues> queues_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_SERVER_H_
