#ifndef MODELSTATE_SERVER_RPC_WATCH_HUB_H_
#define MODELSTATE_SERVER_RPC_WATCH_HUB_H_

#include <grpcpp/support/byte_buffer.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/module/module_instance.h"

namespace modelstate {

// All watchers of one module. A publish costs the module's strand the same however many they are;
// the message of a version is made once and shared.
class WatchHub : public std::enable_shared_from_this<WatchHub> {
 public:
  struct Message {
    Version version;
    grpc::ByteBuffer bytes;  // WatchModuleResponse
  };

  const ModuleInstance& module() const { return *module_; }
  // What watchers are to send by now: at least the version that was current when a watcher joined.
  // Never null; copy the buffer to send it.
  std::shared_ptr<const Message> latest() const;

 private:
  friend class WatchFanOut;
  explicit WatchHub(std::shared_ptr<ModuleInstance> module) : module_(std::move(module)) {}
  // Makes the message of the current version, where that is new.
  void Refresh();

  const std::shared_ptr<ModuleInstance> module_;
  mutable absl::Mutex mutex_;
  std::shared_ptr<const Message> latest_ ABSL_GUARDED_BY(mutex_);

  // The rest is guarded by the mutex of WatchFanOut.
  std::map<uint64_t, std::shared_ptr<const std::function<void()>>> watchers_;
  std::unique_ptr<ModuleInstance::Subscription> subscription_;
  bool changed_ = false;
  int64_t due_ = 0;  // not to be told before; nanoseconds of the steady clock
};

// Tells watchers of new versions on a thread of its own, so that steps do not wait for it. After
// telling the N watchers of a module, which took T of processor time, it lets that module rest for
// 50 T and for 2N ms: so a module sends at most 500 messages a second, one watcher hears within
// about two milliseconds, and many hear less often, of the newest version only. Deletion is told at
// once. Thread-safe.
class WatchFanOut {
 public:
  WatchFanOut();
  // REQUIRES: everybody has left.
  ~WatchFanOut();

  // A watcher's place at the hub of its module, which ends with its last place.
  class Seat {
   public:
    ~Seat();
    const WatchHub& hub() const { return *hub_; }

   private:
    friend class WatchFanOut;
    Seat(WatchFanOut* fan_out, std::shared_ptr<WatchHub> hub, uint64_t id)
        : fan_out_(fan_out), hub_(std::move(hub)), id_(id) {}
    WatchFanOut* const fan_out_;
    const std::shared_ptr<WatchHub> hub_;
    const uint64_t id_;
  };
  // `tell` is called when there is something new to send or to end for, until the seat ends and
  // maybe once after that: it keeps alive what it needs. It must not block.
  std::unique_ptr<Seat> Join(std::shared_ptr<ModuleInstance> module, std::function<void()> tell);

  size_t hub_count() const;

 private:
  void OnChange(WatchHub* hub);
  void Leave(const std::shared_ptr<WatchHub>& hub, uint64_t id);
  void Run();
  // The changed hub that is due first; null when none has changed.
  std::shared_ptr<WatchHub> NextChanged() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;  // after the locks of a module's watchers, never before them
  absl::CondVar wake_;
  std::map<const ModuleInstance*, std::shared_ptr<WatchHub>> hubs_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<WatchHub>> changed_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_WATCH_HUB_H_
