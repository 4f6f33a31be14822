#ifndef MODELSTATE_CLIENT_CLIENT_H_
#define MODELSTATE_CLIENT_CLIENT_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/state_dict.h"
#include "client/types.h"
#include "common/base/transport_profile.h"

namespace modelstate::client {

class Connection;

struct ClientOptions {
  // How long Connect waits for the server to answer.
  absl::Duration connect_timeout = absl::Seconds(10);
  // Deadline of each unary call. Streams have none: they end with their Cancellation.
  absl::Duration timeout = absl::Seconds(60);
  // How often a call that is safe to repeat is made when the server cannot be reached or asks to be
  // called again later, and how long is waited between: doubling, with jitter, and at least what
  // the server's hint says.
  int max_attempts = 5;
  absl::Duration initial_backoff = absl::Milliseconds(200);
  absl::Duration max_backoff = absl::Seconds(10);
  // kWan leaves sockets as the host sets them up; kAuto or kLan is faster near the server.
  TransportProfile transport_profile = TransportProfile::kWan;
};

// Ends calls that were given it: Cancel() from any thread, then they return CANCELLED, or the
// deadline, then DEADLINE_EXCEEDED. Thread-safe. Outlives the calls.
class Cancellation {
 public:
  explicit Cancellation(absl::Time deadline = absl::InfiniteFuture());
  ~Cancellation();
  Cancellation(const Cancellation&) = delete;
  Cancellation& operator=(const Cancellation&) = delete;

  void Cancel();
  bool cancelled() const;

  class Registry;
  Registry& registry() { return *registry_; }  // for the library itself

 private:
  std::unique_ptr<Registry> registry_;
};

// A thin client: each method is one RPC, or a loop over its pages. Thread-safe; copies share one
// connection. A stream is polled and copied by the thread that calls.
//
// Errors are those of the RPC (proto/modelstate/v1/service.proto), with GetReason() and
// GetErrorMetadata() of common/base/status.h; UNAVAILABLE when the server cannot be reached,
// DEADLINE_EXCEEDED. Nothing is checked here that the server checks.
//
// For fast transfers a program that embeds this library may tell glibc to keep what gRPC frees, as
// the command-line tool does: mallopt(M_MMAP_THRESHOLD, 1 << 30), M_TRIM_THRESHOLD 2000000000,
// M_TOP_PAD 64 << 20, M_ARENA_MAX 1 (common/base/tune_malloc.h). The library never does.
class Client {
 public:
  // `target` is HOST:PORT, or several separated by commas, or any gRPC target. Of several addresses
  // the first that answers is used; when it is lost, the first that answers then: addresses of one
  // server, or of servers that may stand in for each other. Waits until the server answers, at most
  // `options.connect_timeout`: UNAVAILABLE.
  static absl::StatusOr<Client> Connect(const std::string& target, ClientOptions options = {});

  // A client of the same server with a TCP connection of its own, which is made at its first call:
  // for transfers that run side by side where one connection does not fill the link.
  Client WithOwnConnection() const;

  absl::StatusOr<ServerInfo> GetServerInfo() const;

  // A module of registered parameters and buffers. `device` empty: the server's first.
  // A spec above one message (4 MiB) is not one call but two, and not atomic: CreateModule of an
  // EMPTY module, then a LoadStateDict that fills it. Until that ends others see the empty module;
  // the elements are admitted against the server's memory for pushes (PUSH_MEMORY). When the load
  // fails or is cancelled the module is deleted again; it stays, EMPTY, when the client is killed
  // or cannot reach the server for that.
  absl::StatusOr<ModuleInfo> CreateModule(const std::string& name, const ModuleSpec& spec,
                                          const std::string& device = "",
                                          Cancellation* cancellation = nullptr) const;
  // The same with all elements zero.
  absl::StatusOr<ModuleInfo> CreateModule(
      const std::string& name, absl::Span<const TensorSpec> tensors = {},
      const std::map<std::string, std::string>& metadata = {}) const;
  // What CreateModule would make the module again from, without its values.
  absl::StatusOr<ModuleSpec> GetModuleSpec(const std::string& module) const;
  absl::StatusOr<ModuleInfo> GetModule(const std::string& module) const;
  absl::StatusOr<std::vector<ModuleInfo>> ListModules() const;
  absl::Status DeleteModule(const std::string& module) const;
  absl::StatusOr<ModuleInfo> MoveModule(const std::string& module,
                                        const MoveOptions& options) const;
  // The newest first, at most `limit`; 0: all that the server remembers.
  absl::StatusOr<std::vector<VersionInfo>> ListVersions(const std::string& module,
                                                        uint64_t limit = 0) const;

  // Gives the number of parameters whose flag changed.
  absl::StatusOr<uint64_t> SetRequiresGrad(const std::string& module, const Selection& selection,
                                           bool requires_grad) const;
  absl::StatusOr<TensorList> ListParameters(const std::string& module,
                                            const ListOptions& options = {}) const;
  absl::StatusOr<TensorList> ListBuffers(const std::string& module,
                                         const ListOptions& options = {}) const;
  // Moments, momentum buffers, master copies and step counts, with their slot. `options.view` does
  // not apply.
  absl::StatusOr<TensorList> ListOptimizerState(const std::string& module,
                                                const ListOptions& options = {}) const;
  absl::StatusOr<TensorElements> GetTensor(const std::string& module, const std::string& name,
                                           const GetTensorOptions& options = {}) const;

  absl::StatusOr<OptimizerInfo> ConfigureOptimizer(const std::string& module,
                                                   const OptimizerConfig& config,
                                                   bool reset_state = false) const;
  absl::StatusOr<OptimizerInfo> GetOptimizer(const std::string& module) const;

  // torch's Optimizer.load_state_dict: replaces all optimizer state, and the configuration where
  // options.optimizer has one; whole or not at all. `tensors` have spec.kind kOptimizerState, the
  // name of the parameter and a slot: of each parameter that is in it "step" (0-dim, at least 1)
  // and every slot that its group keeps ("exp_avg", "momentum_buffer", ...); "master" may be left
  // out. Any floating-point dtype. Retried only where the server refused it with a hint.
  absl::StatusOr<OptimizerInfo> LoadOptimizerState(const std::string& module,
                                                   absl::Span<const TensorRef> tensors,
                                                   const LoadOptimizerStateOptions& options = {},
                                                   Cancellation* cancellation = nullptr) const;

  // A snapshot into memory. A transfer that breaks starts again, from the then newest version.
  // DATA_LOSS DIGEST_MISMATCH when a tensor did not arrive as it was sent.
  absl::StatusOr<StateDict> Fetch(const std::string& module, const FetchOptions& options = {},
                                  Cancellation* cancellation = nullptr) const;
  // The same into `*state`, in the memory that it has where that is enough: for who fetches again
  // and again, since to touch new memory takes longer than to receive into it. With not_modified
  // the tensors stay. After an error it is as it was, or has no tensors.
  absl::Status FetchInto(const std::string& module, StateDict* state,
                         const FetchOptions& options = {},
                         Cancellation* cancellation = nullptr) const;

  // One step. `tensors` are gradients (spec.kind kGradient) and buffer values to assign (kBuffer).
  // With a worker and sequence it is retried and still applied once; a retry asks by the header
  // alone before it sends the bytes again. Returns when gRPC has let go of every borrowed byte.
  absl::StatusOr<StepResult> ApplyStep(const std::string& module,
                                       absl::Span<const TensorRef> tensors,
                                       const StepOptions& options,
                                       Cancellation* cancellation = nullptr) const;
  // The answer to a step that was sent before, by its name alone. `wait`: until the round that it
  // is in closes. STEP_NOT_SEEN when the server has not seen it.
  absl::StatusOr<StepResult> ReplayStep(const std::string& module, const std::string& worker,
                                        uint64_t sequence, bool wait = false,
                                        Cancellation* cancellation = nullptr) const;

  // load_state_dict from memory: all tensors, or with strict=false some. Not retried. For dry_run
  // the bytes of `tensors` are not needed.
  absl::StatusOr<LoadResult> LoadStateDict(const std::string& module,
                                           absl::Span<const TensorRef> tensors,
                                           const LoadOptions& options = {},
                                           Cancellation* cancellation = nullptr) const;

  // Files under the server's checkpoint root. `progress` runs on the calling thread.
  absl::StatusOr<LoadCheckpointResult> LoadCheckpoint(const std::string& module,
                                                      const std::string& path,
                                                      const LoadCheckpointOptions& options = {},
                                                      const ProgressCallback& progress = {},
                                                      Cancellation* cancellation = nullptr) const;
  absl::StatusOr<CheckpointInfo> SaveCheckpoint(const std::string& module, const std::string& path,
                                                const SaveCheckpointOptions& options = {},
                                                const ProgressCallback& progress = {},
                                                Cancellation* cancellation = nullptr) const;
  absl::StatusOr<std::vector<CheckpointInfo>> ListCheckpoints(const std::string& directory = "",
                                                              bool verify = false,
                                                              bool recursive = false) const;
  absl::Status DeleteCheckpoint(const std::string& path) const;

  // lease 0: the server's default. `optimizer_state`: hold that too, for a Fetch with it.
  absl::StatusOr<SnapshotInfo> PinSnapshot(const std::string& module,
                                           absl::Duration lease = absl::ZeroDuration(),
                                           bool optimizer_state = false) const;
  absl::StatusOr<SnapshotInfo> RenewSnapshot(const std::string& module,
                                             const std::string& snapshot_id,
                                             absl::Duration lease = absl::ZeroDuration(),
                                             Cancellation* cancellation = nullptr) const;
  absl::Status ReleaseSnapshot(const std::string& snapshot_id) const;

  // Calls `event` with the current state, then with newer ones (conflated), until it returns false
  // (then OK), the module is deleted (ABORTED MODULE_DELETED) or the call is cancelled.
  absl::Status Watch(const std::string& module, const std::function<bool(const WatchEvent&)>& event,
                     Cancellation* cancellation = nullptr) const;

  // Keeps a copy of a module, or of a selection of it, current: calls `on_version` with the whole
  // state_dict, then again each time that it is newer (versions in between are skipped), always
  // exactly one version. After the first only what changed is sent. Goes on through failures of the
  // connection and restarts of the server, with a whole copy where that is needed. Ends when
  // `on_version` returns false (then OK) or an error, the module is deleted (ABORTED
  // MODULE_DELETED), the call is cancelled, or the server stays away (UNAVAILABLE). Takes the
  // memory of the copy and of what changes at a time.
  absl::Status Follow(
      const std::string& module, const FollowOptions& options,
      const std::function<absl::StatusOr<bool>(const StateDict&, const FollowUpdate&)>& on_version,
      Cancellation* cancellation = nullptr) const;

  // For the library itself.
  Connection& connection() const { return *connection_; }
  const ClientOptions& connection_options() const;

 private:
  explicit Client(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}

  std::shared_ptr<Connection> connection_;
};

}  // namespace modelstate::client

namespace modelstate {
using client::Client;
using client::ClientOptions;
}  // namespace modelstate

#endif  // MODELSTATE_CLIENT_CLIENT_H_
