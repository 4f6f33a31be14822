#ifndef MODELSTATE_SERVER_MODULE_MODULE_INSTANCE_H_
#define MODELSTATE_SERVER_MODULE_MODULE_INSTANCE_H_

#include <asio/strand.hpp>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/device/device.h"
#include "server/module/change_record.h"
#include "server/module/module_environment.h"
#include "server/module/optimizer_state_part.h"
#include "server/module/step_request.h"
#include "server/module/step_round.h"
#include "server/module/version_history.h"
#include "server/module/worker_table.h"
#include "server/state/captured_state.h"
#include "server/state/hold_ledger.h"
#include "server/state/load_plan.h"
#include "server/state/snapshot.h"

namespace modelstate {

// The numbers are those of `modelstate.v1.ModuleState` on the wire.
enum class ModuleState : uint8_t { kEmpty = 1, kReady = 2, kFailed = 3 };

// One hosted module. Everything that changes it runs on its serial strand, one after the other;
// everything that reads it takes a reference to an immutable version and needs no lock after that.
//
// Thread-safe. `Done` callbacks are called once, on the strand's thread (or, after Delete, with
// ABORTED MODULE_DELETED); they must not block.
class ModuleInstance : public std::enable_shared_from_this<ModuleInstance> {
 public:
  template <typename T>
  using Done = absl::AnyInvocable<void(absl::StatusOr<T>)>;

  // Version 1 holds `storages` (by schema index, aliases share their owner's), which are complete.
  ModuleInstance(std::string name, ModuleEnvironment environment,
                 std::shared_ptr<const ModuleSchema> schema, std::vector<StorageRef> storages,
                 ModuleMetadata metadata);
  ~ModuleInstance();

  const std::string& name() const { return name_; }
  absl::Time create_time() const { return create_time_; }
  Device& device() const { return *Current()->device; }
  const ModuleEnvironment& environment() const { return environment_; }

  // What is published now. Not counted as held: for looking, not for streaming.
  VersionRef Current() const;
  ModuleState state() const;
  bool deleted() const;
  // ABORTED MODULE_DELETED once it is; FAILED_PRECONDITION MODULE_FAILED once its device is.
  absl::Status CheckUsable() const;
  // null: none configured.
  std::shared_ptr<const Optimizer> optimizer() const;
  uint64_t optimizer_state_bytes() const;
  // Another after each configuration and load: what optimizer state there is may be wholly other.
  uint64_t optimizer_epoch() const;

  struct TrainingInfo {
    RoundInfo round;
    uint64_t round_memory_bytes = 0;  // set aside of the budget for pushes
    uint64_t workers = 0;             // remembered
  };
  TrainingInfo training_info() const;
  // What a push that steps is staged in: with a quorum the memory that is set aside for rounds. One
  // that accumulates takes the environment's.
  std::shared_ptr<MemoryBudget> push_budget() const;
  // Whether a push is a contribution to a round.
  bool has_rounds() const;

  // Holds the current version. FAILED_PRECONDITION MODULE_EMPTY; ABORTED MODULE_DELETED;
  // RESOURCE_EXHAUSTED SNAPSHOT_LIMIT (server/state/hold_ledger.h says what is counted and when).
  absl::StatusOr<Snapshot> Hold();
  // The version of that number if it is current or still held by somebody; else SNAPSHOT_NOT_FOUND.
  absl::StatusOr<Snapshot> HoldNumber(uint64_t number);
  // Whether HoldNumber could hold it just now; nothing is held by asking.
  bool IsHeld(uint64_t number) const { return ledger_->IsHeld(number); }

  struct FreezeResult {
    Version version;
    uint64_t changed = 0;
  };
  // NOT_FOUND TENSOR_NOT_FOUND; INVALID_ARGUMENT NOT_A_PARAMETER (an exact name of a buffer),
  // INVALID_FIELD (a dtype that cannot require grad); FAILED_PRECONDITION MODULE_EMPTY. Publishes
  // nothing when no flag changes.
  void SetRequiresGrad(Selection selection, bool requires_grad, Done<FreezeResult> done);

  struct ConfigureResult {
    VersionRef version;
    uint64_t dropped_count = 0;
    std::vector<std::string> dropped;  // "exp_avg/layer1.weight", the first 10
  };
  // Optimizer state is kept where SharesState and the new configuration keeps it too, unless
  // `reset_state`. FAILED_PRECONDITION MODULE_EMPTY; the errors of Optimizer::Create, which is
  // called here, on the caller's thread (it may take a second), and again only where the schema
  // has changed meanwhile.
  void ConfigureOptimizer(OptimizerConfig config, bool reset_state, Done<ConfigureResult> done);

  // As it is between two steps. FAILED_PRECONDITION NO_OPTIMIZER; ABORTED STALE_BASE when
  // query.schema is not the current one any more; where elements are asked for, RESOURCE_EXHAUSTED
  // SNAPSHOT_LIMIT: they are held, and only as much as steps can spare.
  void ReadOptimizerState(OptimizerStateQuery query, Done<OptimizerStatePart> done);

  // torch's Module.to: parameters, buffers and optimizer state on `device` (null: stay), which
  // outlives the module, with floating-point tensors in `dtype`; server/state/state_move.h has the
  // rules. One new version, or the current one where nothing would change. A cast counts as a
  // change of the parameters for staleness, going to another device does not. FAILED_PRECONDITION
  // MODULE_EMPTY; INVALID_ARGUMENT INVALID_FIELD (a dtype that is not floating-point);
  // RESOURCE_EXHAUSTED DEVICE_MEMORY. On any error all is as it was.
  void Move(Device* device, std::optional<DType> dtype, Done<VersionRef> done);

  // One push: server/module/step_request.h says what is decided about it, in which order.
  void ApplyStep(StepRequest request, Done<StepAnswer> done);
  // The answer to (worker, sequence) when that is the worker's last push; nullopt when it is new
  // and may be pushed: else SEQUENCE_REUSED (a higher one was seen), ALREADY_CONTRIBUTED,
  // WORKER_LIMIT.
  void FindStep(std::string worker, uint64_t sequence, Done<std::optional<StepAnswer>> done);

  // Closes a round whose timeout is over, and forgets idle workers. To be called now and then.
  void Tick();
  // The caller of StepRequest::call has gone: its wait ends, its contribution counts.
  void EndWait(std::string worker, const void* call);
  // Answers those that wait for a round with `status`, now and from now on: the server stops.
  void EndWaits(absl::Status status);

  // Publishes a staged load. ABORTED STALE_BASE when the schema is no longer the one that was
  // planned against, the module moved to another device, or `base` is given and not current.
  // `restored` replaces optimizer state, worker table, metadata and step count (the optimizer too,
  // where it has one; else the module's own stays, without state); without it the state stays where
  // dtype and shape do, and master copies are made anew from the loaded values.
  void CommitLoad(StagedLoad load, std::optional<Version> base,
                  std::optional<RestoredState> restored, Done<VersionRef> done);

  // Publishes optimizer state in place of the module's own, with an optimizer where it has one; a
  // round that is open goes on. ABORTED STALE_BASE as above, and when the module was configured
  // since; RESOURCE_EXHAUSTED PUSH_MEMORY (rounds).
  void ReplaceOptimizerState(StagedOptimizerState load, std::optional<Version> base,
                             Done<VersionRef> done);

  // One consistent moment for a save. Without `with_optimizer` it holds no more than a reader does,
  // and has no optimizer, optimizer state nor workers.
  void Capture(bool with_optimizer, Done<CapturedState> done);
  // The same for a reader: no workers, and the state of those that SelectStateful selects. Held and
  // refused as Hold does; also TENSOR_NOT_FOUND, NO_OPTIMIZER.
  void HoldWithOptimizer(Selection selection, Done<CapturedState> done);

  // The last versions with a number below `before` (0: all), the newest first, at most `limit`.
  std::vector<VersionRecord> History(uint64_t before, size_t limit) const;

  // Nothing is published after it. Watchers are told.
  void Delete(absl::AnyInvocable<void()> done);
  // The same if it is still empty: calls `on_delete` before; `done` says whether it was deleted.
  void DeleteIfEmpty(absl::AnyInvocable<void()> on_delete, absl::AnyInvocable<void(bool)> done);

  // Calls `on_change` after each publish and after Delete, from the strand, until the subscription
  // ends (which waits for a call that is running, so do not end it from one). It must not block:
  // look at Current() later.
  class Subscription {
   public:
    ~Subscription();

   private:
    friend class ModuleInstance;
    Subscription(std::shared_ptr<ModuleInstance> instance, uint64_t id)
        : instance_(std::move(instance)), id_(id) {}
    std::shared_ptr<ModuleInstance> instance_;
    uint64_t id_;
  };
  std::unique_ptr<Subscription> Subscribe(std::function<void()> on_change);

 private:
  template <typename F>
  void Post(F work);
  // A copy of the current version with the next number, to be changed and published.
  std::shared_ptr<ModuleVersion> NextVersion(MutationKind mutation) const;
  void Publish(std::shared_ptr<ModuleVersion> next, std::shared_ptr<const Optimizer> optimizer,
               VersionChange change, uint64_t new_state_bytes = 0);  // by a step
  void NotifyWatchers();
  absl::Status DeletedError() const;
  absl::Status EmptyError() const;

  // On the strand.
  bool DeleteOnStrand();  // false: it was deleted before
  absl::StatusOr<FreezeResult> FreezeOnStrand(const Selection& selection, bool requires_grad);
  absl::StatusOr<OptimizerStatePart> OptimizerStateOnStrand(const OptimizerStateQuery& query);
  // `resolved` against `schema`, which may be an older one.
  absl::StatusOr<ConfigureResult> ConfigureOnStrand(
      const OptimizerConfig& config, bool reset_state,
      const std::shared_ptr<const ModuleSchema>& schema,
      absl::StatusOr<std::shared_ptr<const Optimizer>> resolved);
  absl::Status CheckBase(const Version& base, const ModuleVersion& current,
                         std::optional<uint64_t> max_staleness) const;
  absl::Status CheckFields(const StepRequest& request, const Optimizer& optimizer) const;
  absl::Status CheckMayPush(const std::string& worker);
  absl::StatusOr<std::optional<StepAnswer>> FindStepOnStrand(const std::string& worker,
                                                             uint64_t sequence);
  absl::StatusOr<StepAnswer> PushOnStrand(StepRequest& request);
  absl::StatusOr<StepAnswer> TakePush(StepRequest& request, WorkerTable::Worker* worker,
                                      const std::shared_ptr<const Optimizer>& optimizer);
  absl::StatusOr<StepAnswer> Accumulate(StepRequest& request, WorkerTable::Worker& worker);
  absl::StatusOr<StepAnswer> Contribute(StepRequest& request, WorkerTable::Worker& worker,
                                        Contribution contribution);
  // Brings gradients to the current schema and device.
  absl::Status BringUpToDate(const ModuleVersion& current, GradientSet& gradients) const;
  // One step from all of these; consumes them where it is applied or skipped. `nonfinite`: which of
  // them are known not to be finite.
  absl::StatusOr<StepAnswer> RunStep(const std::vector<GroupOverride>& overrides,
                                     std::vector<Contribution>& contributions, std::string detail,
                                     std::vector<size_t>* nonfinite = nullptr);
  // Closes the round if it is complete, and answers those that wait.
  absl::Status CloseRoundIfComplete();
  void TickOnStrand();
  void EndWaitsOnStrand(const absl::Status& status);
  // After a change of schema or optimizer, for what was pushed and waits in the round or
  // accumulated: leaves out what is frozen or in no group by now, gives up what does not fit (all
  // of the round, accumulated gradients of each worker alone), then closes the round if it has
  // enough. `change` is what the module did ("was cast"), `before` its optimizer before it.
  void SettlePending(absl::string_view change, const Optimizer* before);
  absl::Status RefitRound(const Optimizer* before);
  absl::Status Refit(GradientSet& gradients) const;
  void GiveUpRound(const absl::Status& status);
  // The contribution does not count: the worker is as it was before.
  void TakeBack(const std::string& worker, StepRound::Member& member);
  // Gradients for parameters that are no more: gives up the round, and what was accumulated.
  void DropPending(const absl::Status& status);
  // For the rounds of `optimizer` (null: none). PUSH_MEMORY; INVALID_FIELD, for --max_workers.
  absl::Status SetMemoryAside(const Optimizer* optimizer, const ModuleSchema& schema);
  void TrimMemoryAside();  // gives back what was set aside for more, and is no longer in use
  void ShowTraining();     // what training_info() tells
  absl::Time Now() const { return environment_.clock ? environment_.clock() : absl::Now(); }
  absl::StatusOr<VersionRef> CommitOnStrand(StagedLoad& load, const std::optional<Version>& base,
                                            std::optional<RestoredState>& restored);
  absl::StatusOr<CapturedState> CaptureOnStrand(bool with_optimizer);
  absl::StatusOr<CapturedState> HoldWithOptimizerOnStrand(const Selection& selection);
  absl::StatusOr<VersionRef> ReplaceOnStrand(StagedOptimizerState& load,
                                             const std::optional<Version>& base);
  // What the next steps take, with optimizer_state_ as it is.
  StepDemand DemandOfSteps(const ModuleVersion& version,
                           const std::shared_ptr<const Optimizer>& optimizer);
  absl::StatusOr<VersionRef> MoveOnStrand(Device* device, std::optional<DType> dtype);
  absl::Status BringGradients(Device& device, GradientSet& gradients) const;
  absl::Status CheckStagedFor(const ModuleVersion& current, absl::Span<const StorageRef> storages,
                              const OptimizerState* state) const;
  absl::Status CheckIsCurrent(const std::optional<Version>& base,
                              const ModuleVersion& current) const;
  absl::Status NoOptimizerError() const;

  const std::string name_;
  const ModuleEnvironment environment_;
  const absl::Time create_time_;

  // On the strand only.
  asio::strand<asio::thread_pool::executor_type> strand_;
  OptimizerState optimizer_state_;
  WorkerTable workers_;
  StepRound round_;
  uint64_t largest_push_ = 0;  // bytes staged by one
  DeviceStepExecutor executor_;
  absl::Status waits_end_;  // EndWaits
  ChangeRecord parameter_changes_;
  // The last DemandOfSteps, and what it was computed for.
  StepDemand demand_;
  std::shared_ptr<const ModuleSchema> demand_schema_;
  std::shared_ptr<const Optimizer> demand_optimizer_;

  std::shared_ptr<HoldLedger> ledger_;  // set once; never called with mutex_ held
  const std::shared_ptr<MemoryBudget> round_budget_;

  // Held for pointer copies and small look-ups, never across I/O or a step.
  mutable absl::Mutex mutex_;
  VersionRef current_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<const Optimizer> optimizer_ ABSL_GUARDED_BY(mutex_);
  VersionHistory history_ ABSL_GUARDED_BY(mutex_);
  bool deleted_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t optimizer_state_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t optimizer_epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  TrainingInfo training_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> needs_tick_{false};
  std::atomic<bool> tick_posted_{false};

  mutable absl::Mutex watchers_mutex_;
  std::map<uint64_t, std::function<void()>> watchers_ ABSL_GUARDED_BY(watchers_mutex_);
  uint64_t next_watcher_ ABSL_GUARDED_BY(watchers_mutex_) = 1;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_MODULE_INSTANCE_H_
