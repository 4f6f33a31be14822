// What of ModuleInstance keeps versions for readers.
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"

namespace modelstate {

absl::StatusOr<Snapshot> ModuleInstance::Hold() {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  if (state() == ModuleState::kEmpty) return EmptyError();
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, ledger_->Hold());
  if (!snapshot) return DeletedError();
  return snapshot;
}

absl::StatusOr<Snapshot> ModuleInstance::HoldNumber(uint64_t number) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  if (state() == ModuleState::kEmpty) return EmptyError();
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, ledger_->HoldNumber(number));
  if (snapshot) return snapshot;
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  const uint64_t current = Current()->version.number;
  return MakeError(
      Reason::kSnapshotNotFound,
      absl::StrCat("module \"", name_, "\": version ", number, " is not held by anybody; version ",
                   current, " is current; pin what is to be read later (PinSnapshot)"),
      {{"module", name_}, {"version", absl::StrCat(number)}, {"current", absl::StrCat(current)}});
}

absl::StatusOr<CapturedState> ModuleInstance::CaptureOnStrand(bool with_optimizer) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  if (state() == ModuleState::kEmpty) return EmptyError();
  if (!with_optimizer) {
    MS_ASSIGN_OR_RETURN(Snapshot snapshot, Hold());
    return CapturedState{name_, std::move(snapshot), nullptr, {}, {}};
  }
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, ledger_->HoldWith(optimizer_state_));
  return CapturedState{name_, std::move(snapshot), optimizer(), optimizer_state_, workers_};
}

StepDemand ModuleInstance::DemandOfSteps(const ModuleVersion& version,
                                         const std::shared_ptr<const Optimizer>& optimizer) {
  const ModuleSchema& schema = *version.schema;
  const bool complete = version.last_mutation == MutationKind::kStep &&
                        version.schema == demand_schema_ && optimizer == demand_optimizer_ &&
                        demand_.new_state_bytes == 0;
  if (complete) return demand_;  // a step only adds state, and none was missing
  demand_ = StepDemand();
  demand_schema_ = version.schema;
  demand_optimizer_ = optimizer;
  if (optimizer == nullptr) return demand_;
  std::vector<SlotInfo> slots;
  std::optional<std::pair<uint32_t, DType>> slots_of;  // group and dtype; mostly those before
  for (uint32_t index = 0; index < schema.size(); ++index) {
    const TensorSpec& spec = schema.spec(index);
    if (schema.owner(index) != index) continue;
    if (spec.kind == TensorKind::kBuffer) demand_.staged_bytes += spec.nbytes();
    if (spec.kind != TensorKind::kParameter || !spec.requires_grad ||
        !IsFloatingPoint(spec.dtype)) {
      continue;
    }
    demand_.staged_bytes += spec.nbytes();
    const uint32_t group = optimizer->group_of(index);
    if (const auto key = std::make_pair(group, spec.dtype); slots_of != key) {
      slots = OptimizerSlots(optimizer->algorithm(), optimizer->groups()[group].hyperparameters,
                             spec.dtype);
      slots_of = key;
    }
    const uint64_t elements = static_cast<uint64_t>(spec.shape.num_elements());
    for (size_t i = 0; i < slots.size(); ++i) {
      if (optimizer_state_.parameters[index].slots[i]) continue;
      demand_.new_state_bytes += elements * DTypeSize(slots[i].dtype);
    }
  }
  return demand_;
}

}  // namespace modelstate
