// What of ModuleInstance keeps versions for readers.
#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"
#include "server/state/optimizer_tensors.h"

namespace modelstate {
namespace {

// A round of more workers than a module remembers could never have enough.
absl::Status CheckQuorum(uint64_t quorum, uint64_t max_workers, const std::string& module) {
  if (quorum <= 1 || quorum <= max_workers) return absl::OkStatus();
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("rounds.quorum is ", quorum, ", and module \"", module, "\" remembers at most ",
                   max_workers,
                   " workers, so that no round could have enough: set a smaller quorum, or raise "
                   "the server's --max_workers"),
      {{"module", module},
       {"field", "rounds.quorum"},
       {"quorum", absl::StrCat(quorum)},
       {"max_workers", absl::StrCat(max_workers)}});
}

}  // namespace

absl::StatusOr<Snapshot> ModuleInstance::Hold() {
  MS_RETURN_IF_ERROR(CheckUsable());
  if (state() == ModuleState::kEmpty) return EmptyError();
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, ledger_->Hold());
  if (!snapshot) return DeletedError();
  return snapshot;
}

absl::StatusOr<Snapshot> ModuleInstance::HoldNumber(uint64_t number) {
  MS_RETURN_IF_ERROR(CheckUsable());
  if (state() == ModuleState::kEmpty) return EmptyError();
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, ledger_->HoldNumber(number));
  if (snapshot) return snapshot;
  MS_RETURN_IF_ERROR(CheckUsable());
  const uint64_t current = Current()->version.number;
  return MakeError(
      Reason::kSnapshotNotFound,
      absl::StrCat("module \"", name_, "\": version ", number, " is not held by anybody; version ",
                   current, " is current; pin what is to be read later (PinSnapshot)"),
      {{"module", name_}, {"version", absl::StrCat(number)}, {"current", absl::StrCat(current)}});
}

absl::StatusOr<CapturedState> ModuleInstance::CaptureOnStrand(bool with_optimizer) {
  MS_RETURN_IF_ERROR(CheckUsable());
  if (state() == ModuleState::kEmpty) return EmptyError();
  if (!with_optimizer) {
    MS_ASSIGN_OR_RETURN(Snapshot snapshot, Hold());
    return CapturedState{name_, std::move(snapshot), nullptr, {}, {}};
  }
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, ledger_->HoldWith(optimizer_state_));
  return CapturedState{name_, std::move(snapshot), optimizer(), optimizer_state_,
                       workers_.Durable()};
}

absl::StatusOr<CapturedState> ModuleInstance::HoldWithOptimizerOnStrand(
    const Selection& selection) {
  MS_RETURN_IF_ERROR(CheckUsable());
  if (state() == ModuleState::kEmpty) return EmptyError();
  CapturedState held{name_, Snapshot(), optimizer(), {}, {}};
  if (held.optimizer == nullptr) return NoOptimizerError();
  const std::shared_ptr<const ModuleSchema> schema = Current()->schema;
  absl::StatusOr<ModuleSchema::Listing> selected = SelectStateful(*schema, selection);
  if (!selected.ok()) {
    return Annotate(selected.status(), absl::StrCat("module \"", name_, "\""));
  }
  held.optimizer_state.parameters.resize(schema->size());
  for (uint32_t index : **selected) {
    held.optimizer_state.parameters[index] = optimizer_state_.parameters[index];
  }
  MS_ASSIGN_OR_RETURN(held.snapshot, ledger_->HoldWith(held.optimizer_state));
  return held;
}

StepDemand ModuleInstance::DemandOfSteps(const ModuleVersion& version,
                                         const std::shared_ptr<const Optimizer>& optimizer) {
  const ModuleSchema& schema = *version.schema;
  const bool complete = version.last_mutation == MutationKind::kStep &&
                        version.schema == demand_schema_ && optimizer == demand_optimizer_ &&
                        demand_.new_state_bytes == 0;
  if (complete) {  // a step only adds state, and none was missing
    demand_.staged_bytes = std::max(demand_.staged_bytes, largest_push_);
    return demand_;
  }
  if (version.schema != demand_schema_) largest_push_ = 0;
  demand_ = StepDemand();
  demand_schema_ = version.schema;
  demand_optimizer_ = optimizer;
  if (optimizer == nullptr) return demand_;
  SlotList slots;
  std::optional<std::pair<uint32_t, DType>> slots_of;  // group and dtype; mostly those before
  for (uint32_t index = 0; index < schema.size(); ++index) {
    const TensorSpec& spec = schema.spec(index);
    if (schema.owner(index) != index) continue;
    if (spec.kind == TensorKind::kBuffer) demand_.staged_bytes += spec.nbytes();
    if (spec.kind != TensorKind::kParameter || !spec.requires_grad ||
        !IsFloatingPoint(spec.dtype)) {
      continue;
    }
    const uint32_t group = optimizer->group_of(index);
    if (group == Optimizer::kNoGroup) continue;
    demand_.staged_bytes += spec.nbytes();
    if (const auto key = std::make_pair(group, spec.dtype); slots_of != key) {
      slots =
          KeptSlots(optimizer->config(), optimizer->groups()[group].hyperparameters, spec.dtype);
      slots_of = key;
    }
    const uint64_t elements = static_cast<uint64_t>(spec.shape.num_elements());
    for (const SlotInfo& slot : slots) {
      if (optimizer_state_.parameters[index].slots[slot.place]) continue;
      demand_.new_state_bytes += elements * DTypeSize(slot.dtype);
    }
  }
  const bool rounds = optimizer->config().rounds.quorum > 1;
  demand_.staged_bytes =
      rounds ? round_budget_->limit() : std::max(demand_.staged_bytes, largest_push_);
  return demand_;
}

absl::Status ModuleInstance::SetMemoryAside(const Optimizer* optimizer,
                                            const ModuleSchema& schema) {
  const uint64_t quorum = optimizer == nullptr ? 1 : optimizer->config().rounds.quorum;
  MS_RETURN_IF_ERROR(CheckQuorum(quorum, environment_.workers.max_workers, name_));
  uint64_t contribution = 0;
  uint64_t outputs = 0;
  for (uint32_t index = 0; index < schema.size() && quorum > 1; ++index) {
    const TensorSpec& spec = schema.spec(index);
    if (schema.owner(index) != index) continue;
    if (spec.kind == TensorKind::kBuffer) contribution += spec.nbytes();
    if (spec.kind != TensorKind::kParameter || !IsFloatingPoint(spec.dtype)) continue;
    // The widest gradient that is taken, and, where all come in other widths than the parameter's,
    // a place for the new parameter.
    contribution += static_cast<uint64_t>(spec.shape.num_elements()) *
                    std::max(DTypeSize(DType::kF32), DTypeSize(spec.dtype));
    outputs += spec.nbytes();
  }
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  const uint64_t bytes = quorum <= 1 ? 0
                         : contribution > (kMax - outputs) / quorum
                             ? kMax
                             : quorum * contribution + outputs;
  const absl::Status status = round_budget_->SetAside(*environment_.push_budget, bytes);
  if (status.ok()) return status;
  return Annotate(status, absl::StrCat("rounds of ", quorum, " contributions of up to ",
                                       contribution, " bytes each"));
}

}  // namespace modelstate
