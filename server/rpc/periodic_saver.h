#ifndef MODELSTATE_SERVER_RPC_PERIODIC_SAVER_H_
#define MODELSTATE_SERVER_RPC_PERIODIC_SAVER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/checkpoint/checkpoint_job.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/module/module_instance.h"

namespace modelstate {

struct Runtime;

// When modules are saved by themselves: at the first look after each multiple of so many steps, or
// after each interval in which there was a new version. Both 0: never.
struct SavePeriod {
  uint64_t steps = 0;
  absl::Duration interval;

  bool enabled() const { return steps > 0 || interval > absl::ZeroDuration(); }
};

// Saves each module when it is due to PeriodicPath, over a checkpoint of the same module and step.
// A module has one such save at a time; one that comes due meanwhile is saved after it. One that
// fails is logged and counted, and the module is saved again when it is due the next time.
// Thread-safe.
class PeriodicSaver {
 public:
  // Outlived by `runtime`. Modules that are there were restored, so they are saved already.
  PeriodicSaver(Runtime* runtime, SavePeriod period);
  // REQUIRES: stopped.
  ~PeriodicSaver() = default;

  const SavePeriod& period() const { return period_; }
  // Begins the saves that are due. To be called now and then, by one thread.
  void Look();
  // No save begins any more. Those that run have until `deadline`, then they are cancelled; returns
  // when none runs.
  void Stop(absl::Time deadline);

  struct Counts {
    uint64_t saved = 0;
    uint64_t failed = 0;
    std::string last_error;
  };
  Counts counts() const;

 private:
  struct Watched {
    std::weak_ptr<ModuleInstance> module;  // another one of its name begins anew
    Version version;                       // of the last save
    uint64_t step = 0;
    absl::Time since;
    std::shared_ptr<JobControl> running;
  };

  bool IsDue(const Watched& watched, const ModuleVersion& current, absl::Time now) const;
  void Begin(std::shared_ptr<ModuleInstance> module, std::shared_ptr<JobControl> control);
  absl::StatusOr<CheckpointInfo> Save(ModuleInstance& module, const CapturedState& state,
                                      JobControl& control);
  void End(const std::string& name, const absl::StatusOr<CheckpointInfo>& saved);
  bool NoneRuns() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);

  Runtime& runtime_;
  const SavePeriod period_;
  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::string, Watched> watched_ ABSL_GUARDED_BY(mutex_);  // by name
  Counts counts_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_PERIODIC_SAVER_H_
