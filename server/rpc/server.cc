#include "server/rpc/server.h"

#include <grpcpp/server_builder.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/wire/transport_tuning.h"
#include "server/rpc/reflection.h"
#include "server/rpc/restore.h"

namespace modelstate {
namespace {

constexpr uint64_t kMinMessageBytes = uint64_t{64} << 10;
// What a chunk's message has beside its data.
constexpr uint64_t kChunkOverhead = 64;

constexpr char kServiceName[] = "modelstate.v1.ModelState";

size_t NetworkThreads(size_t wanted) {
  return wanted != 0 ? wanted : std::max<size_t>(2, std::thread::hardware_concurrency() / 4);
}

absl::Status OptionError(absl::string_view flag, absl::string_view text) {
  return MakeError(Reason::kInvalidField, absl::StrCat("--", flag, ": ", text),
                   {{"field", std::string(flag)}});
}

// Durably: what is saved in it is to be found after a power loss.
absl::Status MakeCheckpointRoot(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<std::string> made;
  for (fs::path part = path; part.has_relative_path() && !fs::exists(part, error);
       part = part.parent_path()) {
    if (part.has_filename()) made.push_back(part.string());
  }
  fs::create_directories(path, error);
  if (error) return OptionError("checkpoint_root", absl::StrCat(path, ": ", error.message()));
  for (const std::string& part : made) MS_RETURN_IF_ERROR(SyncFolderOf(part));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options) {
  std::unique_ptr<Server> server(new Server(std::move(options)));
  MS_RETURN_IF_ERROR(server->CheckOptions());
  MS_RETURN_IF_ERROR(server->StartRuntime());
  MS_RETURN_IF_ERROR(server->Listen());
  return server;
}

absl::Status Server::CheckOptions() const {
  if (options_.max_message_bytes < kMinMessageBytes ||
      options_.max_message_bytes > uint64_t{INT32_MAX}) {
    return OptionError("max_message_bytes", "must be 64KiB to 2GiB - 1");
  }
  if (options_.max_chunk_bytes < 4096 ||
      options_.max_chunk_bytes > options_.max_message_bytes - kChunkOverhead) {
    return OptionError("max_chunk_bytes", "must be at least 4KiB and smaller than a message");
  }
  if (options_.io_threads == 0 || options_.io_threads > 1024) {
    return OptionError("io_threads", "must be 1 to 1024");
  }
  if (options_.network_threads > 1024)
    return OptionError("network_threads", "must be at most 1024");
  if (options_.compute_threads > 1024)
    return OptionError("compute_threads", "must be at most 1024");
  if (options_.max_lease <= absl::ZeroDuration())
    return OptionError("max_lease", "must be positive");
  if (options_.max_workers == 0) return OptionError("max_workers", "must be positive");
  if (options_.worker_expiry <= absl::ZeroDuration()) {
    return OptionError("worker_expiry", "must be positive");
  }
  if (options_.stream_stall_timeout <= absl::ZeroDuration()) {
    return OptionError("stream_stall_timeout", "must be positive");
  }
  if (options_.drain_timeout < absl::ZeroDuration()) {
    return OptionError("drain_timeout", "must not be negative");
  }
  return absl::OkStatus();
}

absl::Status Server::StartRuntime() {
  runtime_.incarnation = RandomUint64();
  runtime_.start_time = absl::Now();
  runtime_.max_message_bytes = options_.max_message_bytes;
  runtime_.max_chunk_bytes = options_.max_chunk_bytes;
  runtime_.stream_stall_timeout = options_.stream_stall_timeout;
  MS_ASSIGN_OR_RETURN(runtime_.devices, MakeDevices(options_.device, options_.device_memory_bytes,
                                                    options_.staging_memory_bytes));
  for (const std::unique_ptr<Device>& device : runtime_.devices) {
    device->OnFailure([this](Device& failed) { OnDeviceFailure(failed); });
  }
  runtime_.compute = std::make_unique<ComputePool>(options_.compute_threads);
  // More than there are processors would only have the disk jump between more places of a file.
  runtime_.readers = std::make_unique<ComputePool>(
      std::min(options_.io_threads, std::max<size_t>(2, runtime_.compute->threads())));
  MS_RETURN_IF_ERROR(MakeCheckpointRoot(options_.checkpoint_root));
  runtime_.log = options_.log ? options_.log : [](absl::LogSeverity, const std::string&) {};
  MS_ASSIGN_OR_RETURN(
      runtime_.checkpoints,
      CheckpointStore::Open(options_.checkpoint_root, [this](const std::string& text) {
        runtime_.log(absl::LogSeverity::kWarning, text);
      }));
  runtime_.retention = options_.retention;
  runtime_.io = std::make_unique<asio::thread_pool>(options_.io_threads);
  runtime_.strands = std::make_unique<asio::thread_pool>(runtime_.compute->threads());

  const uint64_t limit = runtime_.devices.front()->pool()->usage().limit_bytes;
  const auto or_half = [limit](uint64_t bytes) { return bytes != 0 ? bytes : limit / 2; };
  ModuleEnvironment environment;
  environment.device = runtime_.devices.front().get();
  environment.compute = runtime_.compute.get();
  environment.strands = runtime_.strands.get();
  environment.push_budget =
      std::make_shared<MemoryBudget>(Reason::kPushMemory, "memory for arriving pushes and loads",
                                     "--push_memory_bytes", or_half(options_.push_memory_bytes));
  environment.snapshot_budget = std::make_shared<MemoryBudget>(
      Reason::kSnapshotLimit, "memory for versions that pins and streams hold",
      "--snapshot_memory_bytes", or_half(options_.snapshot_memory_bytes));
  const uint64_t casts = options_.cast_memory_bytes != 0 ? options_.cast_memory_bytes : limit / 8;
  runtime_.cast_budget = std::make_shared<MemoryBudget>(
      Reason::kSnapshotLimit, "memory for casts that readers share", "--cast_memory_bytes", casts);
  environment.workers = {options_.max_workers, options_.worker_expiry};
  environment.clock = [] { return absl::Now(); };
  runtime_.pins = std::make_unique<PinTable>(environment.clock, options_.max_lease);
  runtime_.registry = std::make_unique<ModuleRegistry>(std::move(environment));
  health_.SetServing(kServiceName, true);
  runtime_.registry->SetListener(
      [this](const std::string& module, bool ready) { health_.SetServing(module, ready); });
  if (options_.restore_latest) {
    MS_RETURN_IF_ERROR(RestoreModules(runtime_));
  } else if (options_.save_every.enabled()) {
    WarnOfFormerCheckpoints(runtime_);
  }
  runtime_.watches = std::make_unique<WatchFanOut>();
  runtime_.saver = std::make_unique<PeriodicSaver>(&runtime_, options_.save_every);
  runtime_.stalls = std::make_unique<StallSweeper>(
      options_.stream_stall_timeout,
      std::min(absl::Milliseconds(100), options_.stream_stall_timeout / 4), [this] {
        runtime_.pins->ExpireDue();
        runtime_.registry->ForEach([](ModuleInstance& module) { module.Tick(); });
        runtime_.saver->Look();
      });
  // Who waits for a round would not end by itself.
  runtime_.calls.AddDrainHook([this] {
    runtime_.registry->ForEach(
        [](ModuleInstance& module) { module.EndWaits(CallTracker::DrainingError()); });
  });
  return absl::OkStatus();
}

// Later, as the caller may hold any lock.
void Server::OnDeviceFailure(Device& device) {
  runtime_.PostIo([this, &device] {
    runtime_.log(absl::LogSeverity::kError,
                 absl::StrCat("device ", device.name(),
                              " failed, and what it holds is lost: ", device.health().message()));
    health_.SetServing(kServiceName, false);
    runtime_.registry->ForEach([this](ModuleInstance& module) {
      if (module.state() == ModuleState::kFailed) health_.SetServing(module.name(), false);
    });
    if (options_.on_device_failure) options_.on_device_failure();
  });
}

absl::Status Server::Listen() {
  const std::vector<std::string> services = {
      "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
      "grpc.reflection.v1alpha.ServerReflection", kServiceName};
  service_ = std::make_unique<ModelStateService>(&runtime_);

  grpc::ServerBuilder builder;
  builder.AddListeningPort(options_.listen, grpc::InsecureServerCredentials(), &port_);
  // Two servers on one port would share its connections between them.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Finds peers that vanished without a word, and bears clients that look for us in the same way.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 15000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  SetTransportProfile(options_.transport_profile, &builder);
  builder.SetMaxReceiveMessageSize(static_cast<int>(options_.max_message_bytes));
  builder.SetMaxSendMessageSize(-1);
  queues_ = std::make_unique<CallQueues>(&builder, NetworkThreads(options_.network_threads));
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port_ == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("--listen: cannot listen on ", options_.listen,
                     "; is the address right, and is it free? (port 0 picks a free one)"));
  }
  address_ = absl::StrCat(options_.listen.substr(0, options_.listen.rfind(':')), ":", port_);

  std::vector<Call::Method> methods = service_->methods();
  for (std::vector<Call::Method> more : {health_.methods(), ReflectionMethods(services)}) {
    std::move(more.begin(), more.end(), std::back_inserter(methods));
  }
  queues_->Start(&runtime_, std::move(methods));
  return absl::OkStatus();
}

std::shared_ptr<grpc::Channel> Server::InProcessChannel(const grpc::ChannelArguments& arguments) {
  return server_->InProcessChannel(arguments);
}

void Server::Drain() { Stop(options_.drain_timeout); }

Server::~Server() { Stop(absl::ZeroDuration()); }

void Server::Stop(absl::Duration grace) {
  if (std::exchange(stopped_, true)) return;
  const absl::Time deadline = absl::Now() + grace;
  if (server_ != nullptr) {
    // Health first, so that balancers look elsewhere before calls are refused.
    health_.Shutdown();
    runtime_.calls.BeginDrain();
    runtime_.calls.WaitUntilIdle(deadline);
    server_->Shutdown(std::chrono::system_clock::now());
    // Calls that were cut off still have to end: a job stops at its next piece of a file.
    runtime_.calls.WaitUntilIdle(absl::InfiniteFuture());
    queues_->Stop();
    server_->Wait();
  }
  runtime_.stalls.reset();
  if (runtime_.saver != nullptr) runtime_.saver->Stop(deadline);
  runtime_.watches.reset();
  // No call runs any more, so neither pool gives the other anything to do.
  if (runtime_.io != nullptr) runtime_.io->join();
  if (runtime_.strands != nullptr) runtime_.strands->join();
  server_.reset();
  queues_.reset();
  runtime_.saver.reset();
  runtime_.pins.reset();
  runtime_.registry.reset();
}

}  // namespace modelstate
