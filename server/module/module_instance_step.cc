// Steps: pushes, and what they are added to.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"
#include "server/optim/accumulate.h"

namespace modelstate {
namespace {

constexpr absl::Duration kRoundRetry = absl::Milliseconds(200);

// Of contributions whose norms were computed when they arrived.
bool IsKnownNonfinite(const Contribution& contribution) {
  for (const ScaledGradients& part : contribution.parts) {
    for (const GradientSet::Entry& entry : part.gradients.entries) {
      if (entry.norm && !entry.norm->finite) return true;
    }
  }
  return false;
}

// `next` gets what a step wrote (by schema index; null: nothing), and the rest of `current`. Makes
// no reference to what is replaced: there may be very many tensors.
VersionChange TakeStorages(std::vector<StorageRef> written, const ModuleVersion& current,
                           ModuleVersion& next) {
  const ModuleSchema& schema = *next.schema;
  const uint64_t number = next.version.number;
  VersionChange change;
  for (uint32_t index = 0; index < schema.size(); ++index) {
    const uint32_t owner = schema.owner(index);  // an earlier one where it is another
    if (owner != index) {
      written[index] = written[owner];
      next.changed_version[index] = next.changed_version[owner];
    } else if (written[index]) {
      next.changed_version[index] = number;
      change.AddElements(schema.spec(index));
    } else {
      written[index] = current.storages[index];
    }
  }
  next.storages = std::move(written);
  return change;
}

}  // namespace

absl::Status ModuleInstance::CheckBase(const Version& base, const ModuleVersion& current,
                                       std::optional<uint64_t> max_staleness) const {
  if (base.incarnation != current.version.incarnation) {
    return MakeError(Reason::kIncarnationChanged,
                     absl::StrCat("the base is of another life of module \"", name_,
                                  "\" (it was made anew, or the server restarted): fetch version ",
                                  current.version.number, " and begin again from it"),
                     {{"module", name_},
                      {"base_incarnation", absl::StrCat(base.incarnation)},
                      {"incarnation", absl::StrCat(current.version.incarnation)}});
  }
  if (base.number == 0 || base.number > current.version.number) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("base: module \"", name_, "\" never published version ",
                                  base.number, "; version ", current.version.number,
                                  " is current: send the version that was fetched, or none"),
                     {{"module", name_}, {"field", "base"}});
  }
  if (!max_staleness) return absl::OkStatus();
  const std::optional<uint64_t> changes = parameter_changes_.CountAfter(base.number);
  if (changes && *changes <= *max_staleness) return absl::OkStatus();
  return MakeError(
      Reason::kStaleBase,
      absl::StrCat("module \"", name_, "\": parameters changed ",
                   changes ? absl::StrCat(*changes, " times") : "more often than is remembered",
                   " since the push's base, version ", base.number, "; max_staleness is ",
                   *max_staleness, ": fetch version ", current.version.number,
                   " and compute the gradients again"),
      {{"module", name_},
       {"base", absl::StrCat(base.number)},
       {"current", absl::StrCat(current.version.number)},
       {"changes", changes ? absl::StrCat(*changes) : "unknown"},
       {"max_staleness", absl::StrCat(*max_staleness)}});
}

absl::Status ModuleInstance::CheckFields(const StepRequest& request,
                                         const Optimizer& optimizer) const {
  if (request.accumulate && (request.wait || !request.overrides.empty())) {
    const char* field = request.wait ? "wait" : "group_overrides";
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("module \"", name_, "\": ", field,
                                  " is set on a push that accumulates, which takes no step: set it "
                                  "on the push that does"),
                     {{"module", name_}, {"field", field}});
  }
  if (!request.worker.empty()) return absl::OkStatus();
  const char* why = request.accumulate ? "accumulate is set: gradients are kept for their worker"
                    : request.accumulated.value_or(0) > 0
                        ? "accumulated is set: gradients are kept for their worker"
                    : optimizer.config().rounds.quorum > 1
                        ? "the optimizer has rounds, which are made of distinct workers"
                        : nullptr;
  if (why == nullptr) return absl::OkStatus();
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("module \"", name_, "\": ", why, "; set worker and sequence"),
                   {{"module", name_}, {"field", "worker"}});
}

absl::Status ModuleInstance::CheckMayPush(const std::string& worker) {
  const WorkerTable::Worker* known = workers_.Find(worker);
  if (known == nullptr) return workers_.CheckRoom(worker, Now());
  if (!known->in_round) return absl::OkStatus();
  return WithRetryAfter(
      MakeError(Reason::kAlreadyContributed,
                absl::StrCat("worker \"", worker, "\" has contributed sequence ",
                             known->last->sequence, " to the round that is open, with ",
                             round_.size(), " of ", optimizer()->config().rounds.quorum,
                             " contributions: push again when it has closed (`wait` holds the "
                             "answer until then)"),
                {{"module", name_}, {"worker", worker}}),
      kRoundRetry);
}

absl::StatusOr<std::optional<StepAnswer>> ModuleInstance::FindStepOnStrand(
    const std::string& worker, uint64_t sequence) {
  MS_RETURN_IF_ERROR(CheckUsable());
  MS_ASSIGN_OR_RETURN(std::optional<StepAnswer> answer,
                      workers_.FindAnswer(worker, sequence, nullptr, Now()));
  if (!answer) MS_RETURN_IF_ERROR(CheckMayPush(worker));
  return answer;
}

absl::Status ModuleInstance::BringUpToDate(const ModuleVersion& current,
                                           GradientSet& gradients) const {
  if (gradients.schema != current.schema) {
    MS_RETURN_IF_ERROR(RematchGradients(current.schema, gradients));
  }
  return BringGradients(*current.device, gradients);
}

absl::StatusOr<StepAnswer> ModuleInstance::RunStep(const std::vector<GroupOverride>& overrides,
                                                   std::vector<Contribution>& contributions,
                                                   std::string detail,
                                                   std::vector<size_t>* nonfinite) {
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  std::shared_ptr<ModuleVersion> next;
  StepAnswer answer;
  StepResult result;
  VersionChange change;
  {
    const VersionRef current = Current();
    StepOptions options;
    MS_ASSIGN_OR_RETURN(options.hyperparameters, optimizer->Resolve(overrides));
    uint64_t staged = 0;
    for (Contribution& contribution : contributions) {
      for (ScaledGradients& part : contribution.parts) {
        MS_RETURN_IF_ERROR(BringUpToDate(*current, part.gradients));
        staged += part.gradients.reserved_bytes();
      }
    }
    const std::shared_ptr<MemoryBudget> output_budget = push_budget();
    options.output_budget = output_budget.get();
    MS_ASSIGN_OR_RETURN(options.executor, executor_.Get(*current->device, *environment_.compute));
    largest_push_ = std::max(largest_push_, staged);
    // Before the step: nothing may fail after it. The storages will be those of the result.
    next = std::make_shared<ModuleVersion>();
    static_cast<VersionFacts&>(*next) = *current;
    ++next->version.number;
    ++next->step;
    next->last_mutation = MutationKind::kStep;
    next->changed_version = current->changed_version;
    answer.contributions = static_cast<uint32_t>(contributions.size());
    answer.quorum = optimizer->config().rounds.quorum;
    MS_ASSIGN_OR_RETURN(result, ApplyOptimizerStep(*current, *optimizer, options, contributions,
                                                   optimizer_state_, *environment_.compute));
    answer.version = current->version;
    answer.step = current->step;
    if (result.applied) change = TakeStorages(std::move(result.storages), *current, *next);
  }
  answer.grad_norm = result.grad_norm;
  answer.clip_coef = result.clip_coef;
  answer.nonfinite = std::move(result.nonfinite);
  answer.updated = result.updated;
  answer.skipped = result.skipped;
  if (!result.applied) {
    answer.outcome = StepOutcome::kSkippedNonfinite;
    if (nonfinite != nullptr) {
      for (size_t i = 0; i < contributions.size(); ++i) {
        if (IsKnownNonfinite(contributions[i])) nonfinite->push_back(i);
      }
    }
    contributions.clear();
    return answer;
  }
  if (change.parameters() > 0) parameter_changes_.Add(next->version.number);
  next->parameter_changes = parameter_changes_.total();
  change.set_detail(std::move(detail));
  answer.version = next->version;
  answer.step = next->step;
  Publish(std::move(next), optimizer, std::move(change), result.new_state_bytes);
  return answer;
}

absl::StatusOr<StepAnswer> ModuleInstance::PushOnStrand(StepRequest& request) {
  MS_RETURN_IF_ERROR(CheckUsable());
  const bool named = !request.worker.empty();
  if (named != (request.sequence > 0)) {
    return MakeError(Reason::kInvalidField,
                     "worker and sequence name a step together: set both (sequences begin at 1), "
                     "or neither",
                     {{"module", name_}, {"field", named ? "sequence" : "worker"}});
  }
  if (named) {
    const bool compare = request.gradients || !request.payload_digest.empty();
    MS_ASSIGN_OR_RETURN(std::optional<StepAnswer> earlier,
                        workers_.FindAnswer(request.worker, request.sequence,
                                            compare ? &request.payload_digest : nullptr, Now()));
    if (earlier) {
      if (earlier->outcome == StepOutcome::kPending) earlier->contributions = round_.size();
      return *std::move(earlier);
    }
  }
  if (!request.gradients && !request.payload_digest.empty()) {
    // What it repeats was there when its header came, so its payload was not kept.
    return WithRetryAfter(
        MakeError(Reason::kRoundGivenUp,
                  absl::StrCat("sequence ", request.sequence, " of worker \"", request.worker,
                               "\" waited in module \"", name_,
                               "\" when this repeat of it began, and was given up before the "
                               "repeat had come: nothing of it counts; push the same sequence "
                               "again"),
                  {{"module", name_},
                   {"worker", request.worker},
                   {"sequence", absl::StrCat(request.sequence)}}),
        kRoundRetry);
  }
  if (!request.gradients) {
    return MakeError(
        Reason::kStepNotSeen,
        absl::StrCat("module \"", name_, "\" has no answer to sequence ", request.sequence,
                     " of worker \"", request.worker, "\": the step was not seen; send it whole"),
        {{"module", name_},
         {"worker", request.worker},
         {"sequence", absl::StrCat(request.sequence)}});
  }
  if (request.arrival != nullptr) MS_RETURN_IF_ERROR(request.arrival->Finish());
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  if (optimizer == nullptr) return NoOptimizerError();
  MS_RETURN_IF_ERROR(CheckFields(request, *optimizer));
  if (!named) return TakePush(request, nullptr, optimizer);
  MS_RETURN_IF_ERROR(CheckMayPush(request.worker));
  MS_ASSIGN_OR_RETURN(WorkerTable::Worker * worker, workers_.Admit(request.worker, Now()));
  absl::StatusOr<StepAnswer> answer = TakePush(request, worker, optimizer);
  if (!answer.ok()) workers_.RemoveIfNew(request.worker);
  ShowTraining();
  return answer;
}

absl::StatusOr<StepAnswer> ModuleInstance::TakePush(
    StepRequest& request, WorkerTable::Worker* worker,
    const std::shared_ptr<const Optimizer>& optimizer) {
  if (request.base) {
    MS_RETURN_IF_ERROR(CheckBase(*request.base, *Current(), optimizer->config().max_staleness));
  }
  const uint32_t accumulated = worker != nullptr ? worker->accumulated_count : 0;
  const bool anew = request.accumulated == 0u;
  if (request.accumulated && !anew && *request.accumulated != accumulated) {
    return MakeError(
        Reason::kAccumulationLost,
        absl::StrCat("worker \"", request.worker, "\" has accumulated ", *request.accumulated,
                     " pushes, module \"", name_, "\" has ", accumulated,
                     " of them (a restart, a load or ",
                     absl::FormatDuration(workers_.limits().expiry),
                     " of silence drop them): push all gradients of this step again, the "
                     "first with `accumulated` 0"),
        {{"module", name_},
         {"worker", request.worker},
         {"accumulated", absl::StrCat(accumulated)}});
  }
  {
    const VersionRef current = Current();
    MS_RETURN_IF_ERROR(CheckWeightAndScale(request.weight, request.grad_scale.value_or(1)));
    MS_RETURN_IF_ERROR(optimizer->Resolve(request.overrides).status());
    MS_RETURN_IF_ERROR(BringUpToDate(*current, *request.gradients));
    MS_RETURN_IF_ERROR(CheckGroups(*optimizer, *request.gradients));
  }
  if (anew && worker != nullptr) {
    worker->accumulated.reset();
    worker->accumulated_count = 0;
  }
  if (request.accumulate) return Accumulate(request, *worker);

  const uint64_t ignored = request.gradients->ignored;
  Contribution contribution;
  contribution.weight = request.weight;
  if (worker != nullptr && worker->accumulated) {
    contribution.parts.push_back({*std::exchange(worker->accumulated, std::nullopt), 1});
  }
  contribution.parts.push_back({*std::move(request.gradients), request.grad_scale.value_or(1)});
  request.gradients.reset();
  if (optimizer->config().rounds.quorum > 1) {
    return Contribute(request, *worker, std::move(contribution));
  }
  std::vector<Contribution> contributions;
  contributions.push_back(std::move(contribution));
  const std::string detail =
      worker == nullptr ? ""
                        : absl::StrCat("worker ", request.worker, ", sequence ", request.sequence);
  absl::StatusOr<StepAnswer> answer = RunStep(request.overrides, contributions, detail);
  if (!answer.ok()) {
    if (worker != nullptr) worker->TakeBack(contributions.front());
    return answer;
  }
  answer->ignored = ignored;
  if (worker == nullptr) return answer;
  worker->accumulated_count = 0;
  worker->last = WorkerRecord{request.sequence, std::move(request.payload_digest), *answer};
  worker->durable = worker->last;
  return answer;
}

absl::StatusOr<StepAnswer> ModuleInstance::Accumulate(StepRequest& request,
                                                      WorkerTable::Worker& worker) {
  const VersionRef current = Current();
  StepAnswer answer;
  answer.outcome = StepOutcome::kAccumulated;
  answer.version = current->version;
  answer.step = current->step;
  answer.contributions = 0;
  answer.quorum = optimizer()->config().rounds.quorum;
  answer.ignored = request.gradients->ignored;
  if (worker.accumulated) {
    MS_RETURN_IF_ERROR(BringUpToDate(*current, *worker.accumulated));
  }
  MS_ASSIGN_OR_RETURN(StepExecutor * executor,
                      executor_.Get(*current->device, *environment_.compute));
  MS_RETURN_IF_ERROR(AccumulateGradients(*std::move(request.gradients),
                                         request.grad_scale.value_or(1), *current->device,
                                         *environment_.push_budget, *executor, worker.accumulated));
  request.gradients.reset();
  answer.accumulated = ++worker.accumulated_count;
  worker.last = WorkerRecord{request.sequence, std::move(request.payload_digest), answer};
  return answer;
}

}  // namespace modelstate
