#ifndef MODELSTATE_SERVER_MODULE_MODULE_INSTANCE_H_
#define MODELSTATE_SERVER_MODULE_MODULE_INSTANCE_H_

#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>
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
#include "absl/time/time.h"
#include "server/device/compute_pool.h"
#include "server/device/device.h"
#include "server/module/change_record.h"
#include "server/module/optimizer_state_part.h"
#include "server/module/version_history.h"
#include "server/optim/gradient_set.h"
#include "server/optim/step.h"
#include "server/state/captured_state.h"
#include "server/state/hold_ledger.h"
#include "server/state/load_plan.h"
#include "server/state/snapshot.h"

namespace modelstate {

// The numbers are those of `modelstate.v1.ModuleState` on the wire.
enum class ModuleState : uint8_t { kEmpty = 1, kReady = 2, kFailed = 3 };

// What modules run on. Outlives them.
struct ModuleEnvironment {
  Device* device = nullptr;  // where a module begins; ModuleInstance::device() is where it is now
  ComputePool* compute = nullptr;
  asio::thread_pool* strands = nullptr;
  std::shared_ptr<MemoryBudget> snapshot_budget;  // held versions
  std::shared_ptr<MemoryBudget> push_budget;      // arriving pushes and loads
  std::function<absl::Time()> clock;
};

struct StepRequest {
  std::string worker;     // empty: not deduplicated
  uint64_t sequence = 0;  // > 0 with a worker
  std::optional<Version> base;
  double weight = 1;
  std::optional<double> grad_scale;
  std::vector<GroupOverride> overrides;
  std::string payload_digest;
  // nullopt: ask for the answer of an earlier push only (of this payload, where its digest is set).
  std::optional<GradientSet> gradients;
};

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
  // ABORTED MODULE_DELETED once it is.
  absl::Status CheckNotDeleted() const;
  // null: none configured.
  std::shared_ptr<const Optimizer> optimizer() const;
  uint64_t optimizer_state_bytes() const;

  // Holds the current version. FAILED_PRECONDITION MODULE_EMPTY; ABORTED MODULE_DELETED;
  // RESOURCE_EXHAUSTED SNAPSHOT_LIMIT (server/state/hold_ledger.h says what is counted and when).
  absl::StatusOr<Snapshot> Hold();
  // Holds the version of that number if it is current or still held by somebody; else NOT_FOUND
  // SNAPSHOT_NOT_FOUND, saying which is current and to pin what is to be read later.
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

  // State of a parameter is kept where its slots stay the same, unless `reset_state`.
  // FAILED_PRECONDITION MODULE_EMPTY; the errors of Optimizer::Create; UNIMPLEMENTED
  // NOT_IMPLEMENTED: a quorum.
  void ConfigureOptimizer(OptimizerConfig config, bool reset_state, Done<VersionRef> done);

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

  // The whole decision is made on the strand, in this order: the worker's record (a repeat gets its
  // answer with `replayed`; a lower sequence or the same with another payload is SEQUENCE_REUSED),
  // NO_OPTIMIZER, the base (INCARNATION_CHANGED, STALE_BASE by the optimizer's max_staleness), a
  // rematch when the schema has changed, then the step. Only an applied or skipped step is
  // recorded. INVALID_FIELD for a worker without a sequence or the reverse, a weight or grad_scale
  // that is not positive and finite, a base that was never published, and for a header alone whose
  // step is not the worker's last.
  // A base older than the last 4096 runs of consecutive parameter changes is stale whatever
  // max_staleness is, unless that is unset.
  void ApplyStep(StepRequest request, Done<StepAnswer> done);
  // The answer to (worker, sequence) when that is the worker's last step; nullopt when it is new;
  // SEQUENCE_REUSED when a higher one was seen.
  void FindStep(std::string worker, uint64_t sequence, Done<std::optional<StepAnswer>> done);

  // Publishes a staged load. ABORTED STALE_BASE when the schema is no longer the one that was
  // planned against, the module moved to another device since its tensors were staged, or `base` is
  // given and no longer current. Optimizer state: `restored` replaces
  // it, and the worker table, metadata and step count (its optimizer too, where it has one; else
  // the module's own stays, without state); without it the state stays where dtype and shape do,
  // and master copies are dropped, to be made anew from the loaded values.
  void CommitLoad(StagedLoad load, std::optional<Version> base,
                  std::optional<RestoredState> restored, Done<VersionRef> done);

  // One consistent moment for a save. Without `with_optimizer` it holds no more than a reader does,
  // and has no optimizer, optimizer state nor workers.
  void Capture(bool with_optimizer, Done<CapturedState> done);

  // The last versions with a number below `before` (0: all), the newest first, at most `limit`.
  std::vector<VersionRecord> History(uint64_t before, size_t limit) const;

  // Nothing is published after it. Watchers are told.
  void Delete(absl::AnyInvocable<void()> done);
  // The same if it is still empty, which is decided on the strand, where loads commit: calls
  // `on_delete` just before; `done` says whether it was deleted by this call.
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
               VersionChange change);
  void NotifyWatchers();
  absl::Status DeletedError() const;
  absl::Status EmptyError() const;

  // On the strand.
  bool DeleteOnStrand();  // false: it was deleted before
  absl::StatusOr<FreezeResult> FreezeOnStrand(const Selection& selection, bool requires_grad);
  absl::StatusOr<OptimizerStatePart> OptimizerStateOnStrand(const OptimizerStateQuery& query);
  absl::StatusOr<VersionRef> ConfigureOnStrand(const OptimizerConfig& config, bool reset_state);
  absl::StatusOr<std::optional<StepAnswer>> FindRecorded(const std::string& worker,
                                                         uint64_t sequence,
                                                         const std::string* payload_digest) const;
  absl::Status CheckBase(const Version& base, const ModuleVersion& current,
                         std::optional<uint64_t> max_staleness) const;
  absl::StatusOr<StepAnswer> StepOnStrand(StepRequest& request);
  absl::StatusOr<VersionRef> CommitOnStrand(StagedLoad& load, const std::optional<Version>& base,
                                            std::optional<RestoredState>& restored);
  absl::StatusOr<CapturedState> CaptureOnStrand(bool with_optimizer);
  // What the next steps take, with optimizer_state_ as it is.
  StepDemand DemandOfSteps(const ModuleVersion& version,
                           const std::shared_ptr<const Optimizer>& optimizer);
  absl::StatusOr<VersionRef> MoveOnStrand(Device* device, std::optional<DType> dtype);
  // Copies what was staged before a move to where the module is now.
  absl::Status BringGradients(Device& device, GradientSet& gradients) const;
  absl::Status CheckStagedFor(const ModuleVersion& current, const StagedLoad& load,
                              const std::optional<RestoredState>& restored) const;

  const std::string name_;
  const ModuleEnvironment environment_;
  const absl::Time create_time_;

  // Touched on the strand only.
  asio::strand<asio::thread_pool::executor_type> strand_;
  OptimizerState optimizer_state_;
  WorkerTable workers_;
  ChangeRecord parameter_changes_;
  // The last DemandOfSteps, and what it was computed for.
  StepDemand demand_;
  std::shared_ptr<const ModuleSchema> demand_schema_;
  std::shared_ptr<const Optimizer> demand_optimizer_;

  std::shared_ptr<HoldLedger> ledger_;  // set once; never called with mutex_ held

  // Held for pointer copies and small look-ups, never across I/O or a step.
  mutable absl::Mutex mutex_;
  VersionRef current_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<const Optimizer> optimizer_ ABSL_GUARDED_BY(mutex_);
  VersionHistory history_ ABSL_GUARDED_BY(mutex_);
  bool deleted_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t optimizer_state_bytes_ ABSL_GUARDED_BY(mutex_) = 0;

  mutable absl::Mutex watchers_mutex_;
  std::map<uint64_t, std::function<void()>> watchers_ ABSL_GUARDED_BY(watchers_mutex_);
  uint64_t next_watcher_ ABSL_GUARDED_BY(watchers_mutex_) = 1;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_MODULE_INSTANCE_H_
