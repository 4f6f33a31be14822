#include "server/module/module_instance.h"

#include <algorithm>
#include <asio/post.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

uint64_t NewIncarnation() {
  uint64_t incarnation = 0;
  while (incarnation == 0) incarnation = RandomUint64();
  return incarnation;
}

}  // namespace

ModuleInstance::ModuleInstance(std::string name, ModuleEnvironment environment,
                               std::shared_ptr<const ModuleSchema> schema,
                               std::vector<StorageRef> storages, ModuleMetadata metadata)
    : name_(std::move(name)),
      environment_(std::move(environment)),
      create_time_(Now()),
      strand_(environment_.strands->get_executor()),
      workers_(name_, environment_.workers),
      round_budget_(std::make_shared<MemoryBudget>(
          Reason::kPushMemory, absl::StrCat("memory for the rounds of module \"", name_, "\""),
          "--push_memory_bytes", 0)) {
  if (!schema->empty()) parameter_changes_.Add(1);
  optimizer_state_.parameters.resize(schema->size());

  auto first = std::make_shared<ModuleVersion>();
  first->version = {NewIncarnation(), 1};
  first->parameter_changes = parameter_changes_.total();
  first->last_mutation = MutationKind::kCreate;
  first->device = environment_.device;
  first->metadata = std::make_shared<const ModuleMetadata>(std::move(metadata));
  first->storages = std::move(storages);
  first->changed_version.assign(schema->size(), 1);
  first->schema = std::move(schema);
  VersionChange change;
  for (uint32_t index = 0; index < first->schema->size(); ++index) {
    if (first->schema->owner(index) == index) change.AddElements(first->schema->spec(index));
  }
  history_.Add(*first, create_time_, std::move(change));
  current_ = std::move(first);
  ledger_ = std::make_shared<HoldLedger>(name_, environment_.snapshot_budget, current_);
}

ModuleInstance::~ModuleInstance() { ledger_->Close(); }

VersionRef ModuleInstance::Current() const {
  absl::MutexLock lock(&mutex_);
  return current_;
}

ModuleState ModuleInstance::state() const {
  const VersionRef current = Current();
  if (!current->device->health().ok()) return ModuleState::kFailed;
  return current->schema->empty() ? ModuleState::kEmpty : ModuleState::kReady;
}

bool ModuleInstance::deleted() const {
  absl::MutexLock lock(&mutex_);
  return deleted_;
}

std::shared_ptr<const Optimizer> ModuleInstance::optimizer() const {
  absl::MutexLock lock(&mutex_);
  return optimizer_;
}

uint64_t ModuleInstance::optimizer_state_bytes() const {
  absl::MutexLock lock(&mutex_);
  return optimizer_state_bytes_;
}

uint64_t ModuleInstance::optimizer_epoch() const {
  absl::MutexLock lock(&mutex_);
  return optimizer_epoch_;
}

ModuleInstance::TrainingInfo ModuleInstance::training_info() const {
  absl::MutexLock lock(&mutex_);
  TrainingInfo info = training_;
  info.round_memory_bytes = round_budget_->limit();
  return info;
}

bool ModuleInstance::has_rounds() const {
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  return optimizer != nullptr && optimizer->config().rounds.quorum > 1;
}

std::shared_ptr<MemoryBudget> ModuleInstance::push_budget() const {
  return has_rounds() ? round_budget_ : environment_.push_budget;
}

absl::Status ModuleInstance::DeletedError() const {
  return MakeError(Reason::kModuleDeleted,
                   absl::StrCat("module \"", name_, "\" was deleted; this call changed nothing"),
                   {{"module", name_}});
}

absl::Status ModuleInstance::CheckUsable() const {
  if (deleted()) return DeletedError();
  const Device& device = this->device();
  const absl::Status health = device.health();
  if (health.ok()) return absl::OkStatus();
  return MakeError(Reason::kModuleFailed,
                   absl::StrCat("module \"", name_, "\": its device ", device.name(), " failed (",
                                health.message(),
                                "): what it holds is lost; start the server again and load "
                                "the last checkpoint"),
                   {{"module", name_}, {"device", device.name()}});
}

absl::Status ModuleInstance::EmptyError() const {
  return MakeError(Reason::kModuleEmpty,
                   absl::StrCat("module \"", name_,
                                "\" has no tensors yet: load a checkpoint or a state_dict into it "
                                "first"),
                   {{"module", name_}});
}

std::shared_ptr<ModuleVersion> ModuleInstance::NextVersion(MutationKind mutation) const {
  auto next = std::make_shared<ModuleVersion>(*Current());
  ++next->version.number;
  next->last_mutation = mutation;
  return next;
}

void ModuleInstance::Publish(std::shared_ptr<ModuleVersion> next,
                             std::shared_ptr<const Optimizer> optimizer, VersionChange change,
                             uint64_t new_state_bytes) {
  const absl::Time now = Now();
  const uint64_t state_bytes = next->last_mutation == MutationKind::kStep
                                   ? optimizer_state_bytes() + new_state_bytes
                                   : optimizer_state_.nbytes();
  const StepDemand demand = DemandOfSteps(*next, optimizer);
  VersionRef version = std::move(next);
  const bool replaces_state = version->last_mutation == MutationKind::kConfigureOptimizer ||
                              version->last_mutation == MutationKind::kLoad;
  ledger_->Publish(version, optimizer_state_, demand, [&] {
    absl::MutexLock lock(&mutex_);
    history_.Add(*version, now, std::move(change));
    current_.swap(version);
    optimizer_.swap(optimizer);
    optimizer_state_bytes_ = state_bytes;
    if (replaces_state) optimizer_epoch_ = current_->version.number;
  });
  version.reset();  // the last reference, where nobody reads it: its storages go back to the pool
  NotifyWatchers();
}

std::vector<VersionRecord> ModuleInstance::History(uint64_t before, size_t limit) const {
  absl::MutexLock lock(&mutex_);
  return history_.Before(before, limit);
}

void ModuleInstance::NotifyWatchers() {
  absl::MutexLock lock(&watchers_mutex_);
  for (const auto& watcher : watchers_) watcher.second();
}

std::unique_ptr<ModuleInstance::Subscription> ModuleInstance::Subscribe(
    std::function<void()> on_change) {
  absl::MutexLock lock(&watchers_mutex_);
  const uint64_t id = next_watcher_++;
  watchers_.emplace(id, std::move(on_change));
  return std::unique_ptr<Subscription>(new Subscription(shared_from_this(), id));
}

ModuleInstance::Subscription::~Subscription() {
  absl::MutexLock lock(&instance_->watchers_mutex_);
  instance_->watchers_.erase(id_);
}

template <typename F>
void ModuleInstance::Post(F work) {
  asio::post(strand_,
             [self = shared_from_this(), work = std::move(work)]() mutable { work(*self); });
}

void ModuleInstance::SetRequiresGrad(Selection selection, bool requires_grad,
                                     Done<FreezeResult> done) {
  Post([selection = std::move(selection), requires_grad, done = std::move(done)](
           ModuleInstance& self) mutable { done(self.FreezeOnStrand(selection, requires_grad)); });
}

absl::StatusOr<ModuleInstance::FreezeResult> ModuleInstance::FreezeOnStrand(
    const Selection& selection, bool requires_grad) {
  MS_RETURN_IF_ERROR(CheckUsable());
  const VersionRef current = Current();
  const ModuleSchema& schema = *current->schema;
  if (schema.empty()) return EmptyError();
  std::vector<std::string> unknown;
  const std::vector<uint32_t> selected = Select(selection, schema.specs(), &unknown);
  if (!unknown.empty()) {
    return MakeError(Reason::kTensorNotFound,
                     absl::StrCat("module \"", name_, "\" has no tensor ", QuotedList(unknown),
                                  "; ListParameters shows the names"),
                     {{"module", name_}, {"tensor", unknown.front()}});
  }
  for (const std::string& name : selection.names) {
    if (schema.spec(*schema.Find(name)).kind == TensorKind::kParameter) continue;
    return MakeError(Reason::kNotAParameter,
                     absl::StrCat("\"", name,
                                  "\" is a buffer: only parameters can be frozen or unfrozen; "
                                  "leave it out"),
                     {{"module", name_}, {"tensor", name}});
  }

  std::vector<uint32_t> changed;  // owners
  for (uint32_t index : selected) {
    const TensorSpec& spec = schema.spec(index);
    if (spec.kind != TensorKind::kParameter || spec.requires_grad == requires_grad) continue;
    if (requires_grad && !CanRequireGrad(spec.dtype)) {
      return MakeError(
          Reason::kInvalidField,
          absl::StrCat("parameter \"", spec.name, "\" has dtype ", DTypeName(spec.dtype),
                       "; only floating-point and complex ones can require grad: "
                       "leave it out"),
          {{"module", name_}, {"tensor", spec.name}});
    }
    changed.push_back(schema.owner(index));
  }
  std::sort(changed.begin(), changed.end());
  changed.erase(std::unique(changed.begin(), changed.end()), changed.end());
  if (changed.empty()) return FreezeResult{current->version, 0};

  std::shared_ptr<ModuleVersion> next = NextVersion(MutationKind::kFreeze);
  next->schema = schema.WithRequiresGrad(changed, requires_grad);
  const Version version = next->version;
  VersionChange change;
  for (uint32_t index : changed) change.AddName(schema.spec(index));
  change.set_detail(absl::StrCat("requires_grad = ", requires_grad ? "true" : "false"));
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  Publish(std::move(next), optimizer, std::move(change));
  SettlePending(requires_grad ? "had parameters unfrozen" : "had parameters frozen",
                optimizer.get());
  return FreezeResult{version, changed.size()};
}

void ModuleInstance::ConfigureOptimizer(OptimizerConfig config, bool reset_state,
                                        Done<ConfigureResult> done) {
  std::shared_ptr<const ModuleSchema> schema = Current()->schema;
  absl::StatusOr<std::shared_ptr<const Optimizer>> resolved = Optimizer::Create(config, *schema);
  Post([config = std::move(config), reset_state, schema = std::move(schema),
        resolved = std::move(resolved), done = std::move(done)](ModuleInstance& self) mutable {
    done(self.ConfigureOnStrand(config, reset_state, schema, std::move(resolved)));
  });
}

void ModuleInstance::Move(Device* device, std::optional<DType> dtype, Done<VersionRef> done) {
  Post([device, dtype, done = std::move(done)](ModuleInstance& self) mutable {
    done(self.MoveOnStrand(device, dtype));
  });
}

void ModuleInstance::Capture(bool with_optimizer, Done<CapturedState> done) {
  Post([with_optimizer, done = std::move(done)](ModuleInstance& self) mutable {
    done(self.CaptureOnStrand(with_optimizer));
  });
}

void ModuleInstance::HoldWithOptimizer(Selection selection, Done<CapturedState> done) {
  Post([selection = std::move(selection), done = std::move(done)](ModuleInstance& self) mutable {
    done(self.HoldWithOptimizerOnStrand(selection));
  });
}

void ModuleInstance::Delete(absl::AnyInvocable<void()> done) {
  Post([done = std::move(done)](ModuleInstance& self) mutable {
    self.DeleteOnStrand();
    done();
  });
}

void ModuleInstance::DeleteIfEmpty(absl::AnyInvocable<void()> on_delete,
                                   absl::AnyInvocable<void(bool)> done) {
  Post([on_delete = std::move(on_delete), done = std::move(done)](ModuleInstance& self) mutable {
    const bool empty = self.state() == ModuleState::kEmpty && !self.deleted();
    if (empty) on_delete();
    done(empty && self.DeleteOnStrand());
  });
}

bool ModuleInstance::DeleteOnStrand() {
  {
    absl::MutexLock lock(&mutex_);
    if (std::exchange(deleted_, true)) return false;
    optimizer_state_bytes_ = 0;
  }
  ledger_->Close();
  GiveUpRound(DeletedError());
  optimizer_state_ = OptimizerState();
  workers_.Restore({}, Now());
  round_budget_->SetAside(*environment_.push_budget, 0).IgnoreError();  // less never fails
  ShowTraining();
  NotifyWatchers();
  return true;
}

void ModuleInstance::FindStep(std::string worker, uint64_t sequence,
                              Done<std::optional<StepAnswer>> done) {
  Post([worker = std::move(worker), sequence, done = std::move(done)](
           ModuleInstance& self) mutable { done(self.FindStepOnStrand(worker, sequence)); });
}

void ModuleInstance::ApplyStep(StepRequest request, Done<StepAnswer> done) {
  Post([request = std::move(request), done = std::move(done)](ModuleInstance& self) mutable {
    absl::StatusOr<StepAnswer> answer = self.PushOnStrand(request);
    request.gradients.reset();  // a refused push gives its memory back before its caller hears
    self.TrimMemoryAside();
    const bool waits = request.wait && answer.ok() && answer->outcome == StepOutcome::kPending;
    if (!waits) return done(std::move(answer));
    if (!self.waits_end_.ok()) return done(self.waits_end_);
    self.round_.Wait(request.worker, {request.call, answer->replayed, std::move(done)});
  });
}

void ModuleInstance::EndWait(std::string worker, const void* call) {
  Post([worker = std::move(worker), call](ModuleInstance& self) {
    self.round_.EndWait(worker, call, absl::CancelledError("the caller has gone"));
  });
}

void ModuleInstance::Tick() {
  if (!needs_tick_.load(std::memory_order_relaxed)) return;
  if (tick_posted_.exchange(true, std::memory_order_relaxed)) return;  // the strand is busy
  Post([](ModuleInstance& self) { self.TickOnStrand(); });
}

void ModuleInstance::EndWaits(absl::Status status) {
  Post([status = std::move(status)](ModuleInstance& self) { self.EndWaitsOnStrand(status); });
}

void ModuleInstance::CommitLoad(StagedLoad load, std::optional<Version> base,
                                std::optional<RestoredState> restored, Done<VersionRef> done) {
  Post([load = std::move(load), base, restored = std::move(restored),
        done = std::move(done)](ModuleInstance& self) mutable {
    absl::StatusOr<VersionRef> version = self.CommitOnStrand(load, base, restored);
    load = StagedLoad();
    restored.reset();
    done(std::move(version));
  });
}

void ModuleInstance::ReplaceOptimizerState(StagedOptimizerState load, std::optional<Version> base,
                                           Done<VersionRef> done) {
  Post([load = std::move(load), base, done = std::move(done)](ModuleInstance& self) mutable {
    absl::StatusOr<VersionRef> version = self.ReplaceOnStrand(load, base);
    load = StagedOptimizerState();
    done(std::move(version));
  });
}

}  // namespace modelstate
