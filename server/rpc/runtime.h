#ifndef MODELSTATE_SERVER_RPC_RUNTIME_H_
#define MODELSTATE_SERVER_RPC_RUNTIME_H_

#include <asio/post.hpp>
#include <asio/thread_pool.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/log_severity.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/device/compute_pool.h"
#include "server/device/device.h"
#include "server/module/module_registry.h"
#include "server/module/pin_table.h"
#include "server/rpc/call_tracker.h"
#include "server/rpc/periodic_saver.h"
#include "server/rpc/stall_watch.h"
#include "server/rpc/watch_hub.h"

namespace modelstate {

// What all handlers work on: made by Server before the first call, ended after the last one. The
// members are thread-safe; the pointers do not change.
struct Runtime {
  uint64_t incarnation = 0;  // of this start of the server
  absl::Time start_time;
  uint64_t max_message_bytes = 0;
  uint64_t max_chunk_bytes = 0;
  absl::Duration stream_stall_timeout;

  std::function<void(absl::LogSeverity, const std::string&)> log;
  RetentionPolicy retention;

  CallTracker calls;
  std::vector<std::unique_ptr<Device>> devices;  // at least one; modules begin on the first
  std::shared_ptr<MemoryBudget> cast_budget;     // of casts that the readers of a version share
  std::unique_ptr<ComputePool> compute;
  std::unique_ptr<ComputePool> readers;  // of checkpoint files
  std::unique_ptr<CheckpointStore> checkpoints;
  std::unique_ptr<asio::thread_pool> strands;
  std::unique_ptr<ModuleRegistry> registry;
  std::unique_ptr<PinTable> pins;
  std::unique_ptr<StallSweeper> stalls;
  std::unique_ptr<WatchFanOut> watches;
  std::unique_ptr<PeriodicSaver> saver;
  // For what touches files or reads a lot of memory: gRPC's threads must not.
  std::unique_ptr<asio::thread_pool> io;

  template <typename Task>
  void PostIo(Task&& task) {
    asio::post(*io, std::forward<Task>(task));
  }

  // Deletes, later on an I/O thread, what `retention` does not keep now that `saved` is there.
  void ApplyRetention(CheckpointInfo saved);

  // The first device for an empty name; INVALID_FIELD, which lists the devices, for an unknown one.
  absl::StatusOr<Device*> FindDevice(absl::string_view name) const;

  // INVALID_FIELD when `name` is empty, else as ModuleRegistry::Find.
  absl::StatusOr<std::shared_ptr<ModuleInstance>> FindModule(absl::string_view name) const;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_RUNTIME_H_
