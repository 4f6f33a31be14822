// The two mutations of ModuleInstance that change elements: a step and a load.
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"

namespace modelstate {
namespace {

// The optimizer state after a load that restores none. What a load changes the dtype or shape of
// starts anew; a master copy is of the old elements, so the next step makes it from the new ones.
OptimizerState CarryOver(const OptimizerState& state, const LoadPlan& plan,
                         const Optimizer* optimizer) {
  const ModuleSchema& before = *plan.base;
  const ModuleSchema& after = *plan.schema;
  OptimizerState carried;
  carried.parameters.resize(after.size());
  for (uint32_t index = 0; index < after.size(); ++index) {
    const TensorSpec& spec = after.spec(index);
    const std::optional<uint32_t> old = before.Find(spec.name);
    if (!old || spec.kind != TensorKind::kParameter) continue;
    if (before.spec(*old).kind != spec.kind || before.spec(*old).dtype != spec.dtype ||
        before.spec(*old).shape != spec.shape) {
      continue;
    }
    carried.parameters[index] = state.parameters[*old];
  }
  if (optimizer == nullptr) return carried;
  for (const LoadPlan::Item& item : plan.items) {
    ParameterState& parameter = carried.parameters[item.target];
    if (after.spec(item.target).kind != TensorKind::kParameter || parameter.step == 0) continue;
    const std::vector<SlotInfo> slots =
        OptimizerSlots(optimizer->algorithm(),
                       optimizer->groups()[optimizer->group_of(item.target)].hyperparameters,
                       after.spec(item.target).dtype);
    for (size_t i = 0; i < slots.size(); ++i) {
      if (absl::string_view(slots[i].name) == "master") parameter.slots[i] = nullptr;
    }
  }
  return carried;
}

bool PositiveFinite(double value) { return std::isfinite(value) && value > 0; }

}  // namespace

absl::StatusOr<std::optional<StepAnswer>> ModuleInstance::FindRecorded(
    const std::string& worker, uint64_t sequence, const std::string* payload_digest) const {
  const auto it = workers_.find(worker);
  if (it == workers_.end() || sequence > it->second.sequence) return std::optional<StepAnswer>();
  const WorkerRecord& record = it->second;
  const ErrorMetadata metadata{{"module", name_},
                               {"worker", worker},
                               {"sequence", absl::StrCat(sequence)},
                               {"last_sequence", absl::StrCat(record.sequence)}};
  // The last sequence there is has none after it.
  const std::string next = record.sequence == std::numeric_limits<uint64_t>::max()
                               ? "its sequences are used up: use another worker name"
                               : absl::StrCat("go on with ", record.sequence + 1);
  if (sequence < record.sequence) {
    return MakeError(Reason::kSequenceReused,
                     absl::StrCat("worker \"", worker, "\" sent sequence ", sequence,
                                  " after its sequence ", record.sequence, " was decided; ", next),
                     metadata);
  }
  if (payload_digest != nullptr && *payload_digest != record.payload_digest) {
    return MakeError(Reason::kSequenceReused,
                     absl::StrCat("worker \"", worker, "\" sent sequence ", sequence,
                                  " again with another payload; a repeat must be the same bytes; "
                                  "for a new step ",
                                  next),
                     metadata);
  }
  StepAnswer answer = record.answer;
  answer.replayed = true;
  return std::optional<StepAnswer>(std::move(answer));
}

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

absl::StatusOr<StepAnswer> ModuleInstance::StepOnStrand(StepRequest& request) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  const bool recorded = !request.worker.empty();
  if (recorded != (request.sequence > 0)) {
    return MakeError(Reason::kInvalidField,
                     "worker and sequence name a step together: set both (sequences begin at 1), "
                     "or neither",
                     {{"module", name_}, {"field", recorded ? "sequence" : "worker"}});
  }
  if (recorded) {
    const bool compare = request.gradients || !request.payload_digest.empty();
    MS_ASSIGN_OR_RETURN(std::optional<StepAnswer> earlier,
                        FindRecorded(request.worker, request.sequence,
                                     compare ? &request.payload_digest : nullptr));
    if (earlier) return *std::move(earlier);
  }
  if (!request.gradients) {
    return MakeError(
        Reason::kInvalidField,
        absl::StrCat("module \"", name_, "\" has no answer to sequence ", request.sequence,
                     " of worker \"", request.worker, "\": the step was not seen; send it whole"),
        {{"module", name_}, {"field", "tensors"}});
  }

  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  if (optimizer == nullptr) {
    return MakeError(
        Reason::kNoOptimizer,
        absl::StrCat("module \"", name_, "\" has no optimizer: call ConfigureOptimizer first"),
        {{"module", name_}});
  }
  std::shared_ptr<ModuleVersion> next;
  StepAnswer answer;
  StepResult result;
  {
    const VersionRef current = Current();
    if (request.base) {
      MS_RETURN_IF_ERROR(CheckBase(*request.base, *current, optimizer->config().max_staleness));
    }
    if (!PositiveFinite(request.weight) || !PositiveFinite(request.grad_scale.value_or(1))) {
      const char* field = PositiveFinite(request.weight) ? "grad_scale" : "weight";
      return MakeError(Reason::kInvalidField,
                       absl::StrCat(field, " must be positive and finite; leave it out for 1"),
                       {{"module", name_}, {"field", field}});
    }
    StepOptions options{request.grad_scale, {}};
    MS_ASSIGN_OR_RETURN(options.hyperparameters, optimizer->Resolve(request.overrides));
    GradientSet gradients = *std::move(request.gradients);
    request.gradients.reset();
    if (gradients.schema != current->schema) {
      MS_RETURN_IF_ERROR(RematchGradients(current->schema, gradients));
    }
    MS_RETURN_IF_ERROR(BringGradients(*current->device, gradients));
    answer.ignored = gradients.ignored;
    next = NextVersion(MutationKind::kStep);  // before the step: nothing may fail after it
    MS_ASSIGN_OR_RETURN(result,
                        ApplyOptimizerStep(*current, *optimizer, options, std::move(gradients),
                                           optimizer_state_, *environment_.compute));
    answer.version = current->version;
    answer.step = current->step;
  }
  answer.grad_norm = result.grad_norm;
  answer.clip_coef = result.clip_coef;
  answer.nonfinite = std::move(result.nonfinite);
  answer.updated = result.updated;
  answer.skipped = result.skipped;

  if (result.applied) {
    const ModuleSchema& schema = *next->schema;
    const uint64_t number = next->version.number;
    VersionChange change;
    for (uint32_t index = 0; index < schema.size(); ++index) {
      const StorageRef& storage = result.storages[schema.owner(index)];
      if (!storage) continue;
      next->storages[index] = storage;
      next->changed_version[index] = number;
      if (schema.owner(index) == index) change.AddElements(schema.spec(index));
    }
    if (change.parameters() > 0) parameter_changes_.Add(number);
    next->parameter_changes = parameter_changes_.total();
    ++next->step;
    if (recorded) {
      change.set_detail(absl::StrCat("worker ", request.worker, ", sequence ", request.sequence));
    }
    answer.version = next->version;
    answer.step = next->step;
    Publish(std::move(next), optimizer, std::move(change));
  } else {
    answer.outcome = StepOutcome::kSkippedNonfinite;
  }
  if (recorded) {
    workers_[request.worker] = {request.sequence, std::move(request.payload_digest), answer};
  }
  return answer;
}

absl::StatusOr<VersionRef> ModuleInstance::CommitOnStrand(StagedLoad& load,
                                                          const std::optional<Version>& base,
                                                          std::optional<RestoredState>& restored) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  const std::shared_ptr<const ModuleSchema> schema = load.plan.schema;
  std::shared_ptr<ModuleVersion> next = NextVersion(MutationKind::kLoad);
  {
    const VersionRef current = Current();
    if (base) {
      if (base->incarnation != current->version.incarnation) {
        return CheckBase(*base, *current, std::nullopt);
      }
      if (*base != current->version) {
        return MakeError(Reason::kStaleBase,
                         absl::StrCat("module \"", name_, "\" is at version ",
                                      current->version.number, ", not at the base of this load, ",
                                      base->number, ": look at what changed and load again"),
                         {{"module", name_},
                          {"base", absl::StrCat(base->number)},
                          {"current", absl::StrCat(current->version.number)}});
      }
    }
    if (load.plan.base != current->schema) {
      return MakeError(
          Reason::kStaleBase,
          absl::StrCat("the tensors of module \"", name_,
                       "\" changed (a load or a freeze) while this load ran: load again"),
          {{"module", name_}, {"current", absl::StrCat(current->version.number)}});
    }
    MS_RETURN_IF_ERROR(CheckStagedFor(*current, load, restored));
  }

  std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  if (restored && restored->optimizer != nullptr) {
    optimizer = restored->optimizer;
  } else if (optimizer != nullptr && schema != load.plan.base) {
    MS_ASSIGN_OR_RETURN(optimizer, Optimizer::Create(optimizer->config(), *schema));
  }
  if (load.storages.size() != load.plan.items.size() ||
      (restored && restored->optimizer_state.parameters.size() > schema->size())) {
    return absl::InternalError("a staged load does not fit its plan");
  }

  const uint64_t number = next->version.number;
  VersionChange change;
  next->schema = schema;
  if (schema != load.plan.base) {
    // By name, so that it does not matter whether the load keeps the order.
    std::vector<StorageRef> storages(schema->size());
    std::vector<uint64_t> changed_version(schema->size(), number);
    for (uint32_t index = 0; index < schema->size(); ++index) {
      const std::optional<uint32_t> old = load.plan.base->Find(schema->spec(index).name);
      if (!old) continue;
      storages[index] = next->storages[*old];
      changed_version[index] = next->changed_version[*old];
    }
    next->storages = std::move(storages);
    next->changed_version = std::move(changed_version);
  }
  for (size_t i = 0; i < load.plan.items.size(); ++i) {
    const uint32_t target = load.plan.items[i].target;
    next->storages[target] = std::move(load.storages[i]);
    next->changed_version[target] = number;
    change.AddElements(schema->spec(target));
  }
  for (uint32_t index = 0; index < schema->size(); ++index) {
    const uint32_t owner = schema->owner(index);
    next->storages[index] = next->storages[owner];
    next->changed_version[index] = next->changed_version[owner];
    if (!next->storages[index]) {
      return absl::InternalError(
          absl::StrCat("the load leaves \"", schema->spec(index).name, "\" without elements"));
    }
  }

  // Nothing fails from here on.
  if (restored) {
    optimizer_state_ = std::move(restored->optimizer_state);
    optimizer_state_.parameters.resize(schema->size());
    workers_ = std::move(restored->workers);
    next->step = restored->step;
    next->metadata = std::make_shared<const ModuleMetadata>(std::move(restored->metadata));
  } else {
    optimizer_state_ = CarryOver(optimizer_state_, load.plan, optimizer.get());
    const bool buffers_only =
        schema == load.plan.base && change.parameters() == 0 && change.buffers() > 0;
    if (buffers_only) next->last_mutation = MutationKind::kBufferWrite;
  }
  change.set_detail(std::move(load.detail));
  if (change.parameters() > 0) parameter_changes_.Add(number);
  next->parameter_changes = parameter_changes_.total();
  VersionRef published = next;
  Publish(std::move(next), std::move(optimizer), std::move(change));
  return published;
}

}  // namespace modelstate
