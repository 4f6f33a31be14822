#include "server/rpc/periodic_saver.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/rpc/runtime.h"

namespace modelstate {
namespace {

void IgnoreProgress(const JobProgress&) {}

}  // namespace

PeriodicSaver::PeriodicSaver(Runtime* runtime, SavePeriod period)
    : runtime_(*runtime), period_(period) {
  const absl::Time now = absl::Now();
  absl::MutexLock lock(&mutex_);
  runtime_.registry->ForEach([&](ModuleInstance& module) {
    const VersionRef current = module.Current();
    watched_[module.name()] = {module.shared_from_this(), current->version, current->step, now,
                               nullptr};
  });
}

bool PeriodicSaver::IsDue(const Watched& watched, const ModuleVersion& current,
                          absl::Time now) const {
  if (period_.steps > 0) return current.step / period_.steps > watched.step / period_.steps;
  return now - watched.since >= period_.interval && current.version != watched.version;
}

void PeriodicSaver::Look() {
  if (!period_.enabled()) return;
  std::vector<std::shared_ptr<ModuleInstance>> modules;
  runtime_.registry->ForEach([&modules](ModuleInstance& module) {
    if (module.state() == ModuleState::kReady) modules.push_back(module.shared_from_this());
  });
  const absl::Time now = absl::Now();
  for (std::shared_ptr<ModuleInstance>& module : modules) {
    const VersionRef current = module->Current();
    auto control = std::make_shared<JobControl>(IgnoreProgress);
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return;
      Watched& watched = watched_[module->name()];
      if (watched.running != nullptr) continue;
      if (watched.module.lock() != module) {
        watched = {module, Version(), 0, now, nullptr};
      }
      // A load took it back to an earlier step.
      watched.step = std::min(watched.step, current->step);
      if (!IsDue(watched, *current, now)) continue;
      watched.version = current->version;
      watched.step = current->step;
      watched.since = now;
      watched.running = control;
    }
    Begin(std::move(module), std::move(control));
  }
  absl::MutexLock lock(&mutex_);
  std::erase_if(watched_, [](const auto& item) {
    return item.second.running == nullptr && item.second.module.expired();
  });
}

void PeriodicSaver::Begin(std::shared_ptr<ModuleInstance> module,
                          std::shared_ptr<JobControl> control) {
  ModuleInstance& captured = *module;
  captured.Capture(/*with_optimizer=*/true, [this, module = std::move(module),
                                             control = std::move(control)](
                                                absl::StatusOr<CapturedState> state) mutable {
    if (!state.ok()) return End(module->name(), state.status());
    runtime_.PostIo([this, module = std::move(module), control = std::move(control),
                     state = *std::move(state)]() mutable {
      absl::StatusOr<CheckpointInfo> saved = Save(*module, state, *control);
      {
        const CapturedState ended = std::move(state);  // nothing is held when it counts as ended
      }
      if (saved.ok()) runtime_.ApplyRetention(*saved);
      // What a module took with it when it was deleted is no failure.
      if (!saved.ok() && module->deleted()) saved = module->CheckUsable();
      End(module->name(), saved);
    });
  });
}

absl::StatusOr<CheckpointInfo> PeriodicSaver::Save(ModuleInstance& module,
                                                   const CapturedState& state,
                                                   JobControl& control) {
  const auto deletion = module.Subscribe([&module, &control] {
    if (module.deleted()) control.Cancel();
  });
  MS_RETURN_IF_ERROR(module.CheckUsable());
  SaveOptions options;
  options.overwrite = true;
  options.same_module = true;
  return runtime_.checkpoints->Save(state, PeriodicPath(module.name(), state.snapshot->step),
                                    options, control);
}

void PeriodicSaver::End(const std::string& name, const absl::StatusOr<CheckpointInfo>& saved) {
  const absl::Status& status = saved.status();
  const bool expected = absl::IsCancelled(status) || GetReason(status) == Reason::kModuleDeleted;
  {
    // Before the log tells of it.
    absl::MutexLock lock(&mutex_);
    if (status.ok()) {
      ++counts_.saved;
    } else if (!expected) {
      ++counts_.failed;
      counts_.last_error = std::string(status.message());
    }
  }
  if (status.ok()) {
    runtime_.log(absl::LogSeverity::kInfo, absl::StrCat("module \"", name, "\" is saved to \"",
                                                        saved->path, "\", step ", saved->step));
    if (!saved->set_aside.empty()) {
      runtime_.log(absl::LogSeverity::kWarning,
                   absl::StrCat("what another life of module \"", name, "\" had saved to \"",
                                saved->path, "\" is kept as \"", saved->set_aside,
                                "\", for ever: delete it when nobody wants it"));
    }
  } else if (!expected) {
    runtime_.log(absl::LogSeverity::kError,
                 absl::StrCat("module \"", name,
                              "\" is not saved, until it is due again: ", status.message()));
  }
  absl::MutexLock lock(&mutex_);
  watched_[name].running = nullptr;
}

bool PeriodicSaver::NoneRuns() const {
  for (const auto& [name, watched] : watched_) {
    if (watched.running != nullptr) return false;
  }
  return true;
}

void PeriodicSaver::Stop(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  stopping_ = true;
  const absl::Condition none_runs(this, &PeriodicSaver::NoneRuns);
  if (mutex_.AwaitWithDeadline(none_runs, deadline)) return;
  for (const auto& [name, watched] : watched_) {
    if (watched.running != nullptr) watched.running->Cancel();
  }
  mutex_.Await(none_runs);
}

PeriodicSaver::Counts PeriodicSaver::counts() const {
  absl::MutexLock lock(&mutex_);
  return counts_;
}

}  // namespace modelstate
