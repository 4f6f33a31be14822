// The mutations of ModuleInstance that take elements from elsewhere: loads.
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
    parameter.slots[kMasterPlace] = nullptr;
  }
  return carried;
}

}  // namespace

absl::Status ModuleInstance::CheckIsCurrent(const std::optional<Version>& base,
                                            const ModuleVersion& current) const {
  if (!base || *base == current.version) return absl::OkStatus();
  if (base->incarnation != current.version.incarnation) {
    return CheckBase(*base, current, std::nullopt);
  }
  return MakeError(Reason::kStaleBase,
                   absl::StrCat("module \"", name_, "\" is at version ", current.version.number,
                                ", not at the base of this load, ", base->number,
                                ": look at what changed and load again"),
                   {{"module", name_},
                    {"base", absl::StrCat(base->number)},
                    {"current", absl::StrCat(current.version.number)}});
}

absl::StatusOr<VersionRef> ModuleInstance::CommitOnStrand(StagedLoad& load,
                                                          const std::optional<Version>& base,
                                                          std::optional<RestoredState>& restored) {
  MS_RETURN_IF_ERROR(CheckUsable());
  const std::shared_ptr<const ModuleSchema> schema = load.plan.schema;
  std::shared_ptr<ModuleVersion> next = NextVersion(MutationKind::kLoad);
  {
    const VersionRef current = Current();
    MS_RETURN_IF_ERROR(CheckIsCurrent(base, *current));
    if (load.plan.base != current->schema) {
      return MakeError(
          Reason::kStaleBase,
          absl::StrCat("the tensors of module \"", name_,
                       "\" changed (a load or a freeze) while this load ran: load again"),
          {{"module", name_}, {"current", absl::StrCat(current->version.number)}});
    }
    MS_RETURN_IF_ERROR(
        CheckStagedFor(*current, load.storages, restored ? &restored->optimizer_state : nullptr));
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

  MS_RETURN_IF_ERROR(SetMemoryAside(optimizer.get(), *schema));

  // Nothing fails from here on.
  if (restored || change.parameters() > 0) {
    DropPending(MakeError(Reason::kStaleBase,
                          absl::StrCat("module \"", name_,
                                       "\" was loaded anew while a round was open: fetch version ",
                                       number, " and push the step again, computed from it"),
                          {{"module", name_}, {"current", absl::StrCat(number)}}));
  }
  if (restored) {
    optimizer_state_ = std::move(restored->optimizer_state);
    optimizer_state_.parameters.resize(schema->size());
    workers_.Restore(std::move(restored->workers), Now());
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
  const std::shared_ptr<const Optimizer> before = this->optimizer();
  Publish(std::move(next), std::move(optimizer), std::move(change));
  SettlePending("was loaded", before.get());
  return published;
}

absl::StatusOr<VersionRef> ModuleInstance::ReplaceOnStrand(StagedOptimizerState& load,
                                                           const std::optional<Version>& base) {
  MS_RETURN_IF_ERROR(CheckUsable());
  const VersionRef current = Current();
  MS_RETURN_IF_ERROR(CheckIsCurrent(base, *current));
  if (load.schema != current->schema || (!load.configures && load.optimizer != optimizer())) {
    return MakeError(
        Reason::kStaleBase,
        absl::StrCat("the tensors or the optimizer of module \"", name_,
                     "\" changed while this optimizer state was loaded: load it again"),
        {{"module", name_}, {"current", absl::StrCat(current->version.number)}});
  }
  MS_RETURN_IF_ERROR(CheckStagedFor(*current, {}, &load.state));
  MS_RETURN_IF_ERROR(SetMemoryAside(load.optimizer.get(), *load.schema));

  // Nothing fails from here on.
  uint64_t count = 0;
  for (const ParameterState& parameter : load.state.parameters) count += parameter.step > 0;
  VersionChange change;
  std::string detail =
      absl::StrCat("optimizer state of ", count, count == 1 ? " parameter" : " parameters");
  if (load.configures) {
    absl::StrAppend(&detail, ", for ", AlgorithmName(load.optimizer->algorithm()));
  }
  change.set_detail(std::move(detail));
  std::shared_ptr<ModuleVersion> next = NextVersion(MutationKind::kLoad);
  if (load.step) next->step = *load.step;
  optimizer_state_ = std::move(load.state);
  VersionRef published = next;
  const std::shared_ptr<const Optimizer> before = optimizer();
  Publish(std::move(next), std::move(load.optimizer), std::move(change));
  SettlePending("had its optimizer state loaded", before.get());
  return published;
}

}  // namespace modelstate
