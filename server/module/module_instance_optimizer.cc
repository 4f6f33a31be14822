// What of ModuleInstance sets and shows the optimizer.
#include <algorithm>
#include <asio/post.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"
#include "server/rules/rule_info.h"

namespace modelstate {
namespace {

constexpr size_t kNamesShown = 10;

// What of a parameter's state goes on under the new optimizer.
ParameterState KeepState(const ParameterState& state, DType dtype, const Optimizer& before,
                         const Optimizer& after, uint32_t group) {
  ParameterState kept;
  if (group == Optimizer::kNoGroup || !SharesState(before.algorithm(), after.algorithm())) {
    return kept;
  }
  kept.step = state.step;
  kept.product = state.product;
  const Hyperparameters& h = after.groups()[group].hyperparameters;
  for (const SlotInfo& slot : KeptSlots(after.config(), h, dtype)) {
    kept.slots[slot.place] = state.slots[slot.place];
  }
  return kept;
}

}  // namespace

absl::StatusOr<ModuleInstance::ConfigureResult> ModuleInstance::ConfigureOnStrand(
    const OptimizerConfig& config, bool reset_state,
    const std::shared_ptr<const ModuleSchema>& resolved_for,
    absl::StatusOr<std::shared_ptr<const Optimizer>> resolved) {
  MS_RETURN_IF_ERROR(CheckUsable());
  const VersionRef current = Current();
  const ModuleSchema& schema = *current->schema;
  if (schema.empty()) return EmptyError();
  if (resolved_for != current->schema) resolved = Optimizer::Create(config, schema);
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const Optimizer> next_optimizer, std::move(resolved));
  MS_RETURN_IF_ERROR(SetMemoryAside(next_optimizer.get(), schema));
  const std::shared_ptr<const Optimizer> before = optimizer();
  ConfigureResult result;
  for (uint32_t index = 0; index < schema.size() && before != nullptr; ++index) {
    ParameterState& state = optimizer_state_.parameters[index];
    if (state.step == 0) continue;
    const TensorSpec& spec = schema.spec(index);
    ParameterState kept;
    if (!reset_state) {
      kept =
          KeepState(state, spec.dtype, *before, *next_optimizer, next_optimizer->group_of(index));
    }
    for (const SlotInfo& slot : AllSlots(before->algorithm(), spec.dtype)) {
      if (!state.slots[slot.place] || kept.slots[slot.place]) continue;
      ++result.dropped_count;
      if (result.dropped.size() < kNamesShown) {
        result.dropped.push_back(absl::StrCat(slot.name, "/", spec.name));
      }
    }
    state = std::move(kept);
  }
  VersionChange change;
  change.set_detail(
      absl::StrCat(AlgorithmName(config.algorithm), reset_state ? ", state reset" : ""));
  Publish(NextVersion(MutationKind::kConfigureOptimizer), std::move(next_optimizer),
          std::move(change));
  result.version = Current();
  SettlePending("was configured anew", before.get());
  return result;
}

absl::Status ModuleInstance::NoOptimizerError() const {
  return MakeError(
      Reason::kNoOptimizer,
      absl::StrCat("module \"", name_, "\" has no optimizer: call ConfigureOptimizer first"),
      {{"module", name_}});
}

void ModuleInstance::ReadOptimizerState(OptimizerStateQuery query, Done<OptimizerStatePart> done) {
  asio::post(strand_,
             [self = shared_from_this(), query = std::move(query),
              done = std::move(done)]() mutable { done(self->OptimizerStateOnStrand(query)); });
}

absl::StatusOr<OptimizerStatePart> ModuleInstance::OptimizerStateOnStrand(
    const OptimizerStateQuery& query) {
  MS_RETURN_IF_ERROR(CheckUsable());
  OptimizerStatePart part;
  {
    // No more of the version than this: the part may wait for long.
    const VersionRef current = Current();
    part.version = current->version;
    part.step = current->step;
    part.schema = current->schema;
  }
  part.optimizer = optimizer();
  if (part.optimizer == nullptr) {
    return NoOptimizerError();
  }
  if (part.schema != query.schema || optimizer_epoch() != query.epoch) {
    return MakeError(Reason::kStaleBase,
                     absl::StrCat("the tensors or the optimizer of module \"", name_,
                                  "\" changed while they were listed: list again"),
                     {{"module", name_}});
  }
  const std::vector<uint32_t>& parameters = *query.parameters;
  const bool has_product = GetRule(part.optimizer->algorithm()).product != nullptr;
  const auto slots_of = [has_product](const ParameterState& state) {
    uint64_t slots = has_product ? 1 : 0;
    for (const RefPtr<TensorStorage>& slot : state.slots) slots += slot ? 1 : 0;
    return slots;
  };
  for (uint32_t index : parameters) {
    const ParameterState& state = optimizer_state_.parameters[index];
    if (state.step > 0) part.count += 1 + slots_of(state);
  }
  uint64_t referenced = 0;
  std::vector<StorageRef> storages;
  auto it = std::lower_bound(parameters.begin(), parameters.end(), query.from.parameter);
  for (; it != parameters.end() && !part.next; ++it) {
    const ParameterState& state = optimizer_state_.parameters[*it];
    if (state.step == 0) continue;
    for (uint32_t slot = *it == query.from.parameter ? query.from.slot : 0; slot <= kProductPlace;
         ++slot) {
      if (slot == kProductPlace && !has_product) continue;
      const bool scalar = slot == 0 || slot == kProductPlace;
      const RefPtr<TensorStorage>* storage = scalar ? nullptr : &state.slots[slot - 1];
      if (storage != nullptr && !*storage) continue;
      const bool full = query.max_referenced_bytes > 0 && referenced >= query.max_referenced_bytes;
      if (part.entries.size() >= query.max_entries || full) {
        part.next = OptimizerStatePlace{*it, slot};
        break;
      }
      OptimizerStatePart::Entry& entry = part.entries.emplace_back();
      entry.place = {*it, slot};
      entry.scalar = slot == 0 ? static_cast<float>(state.step) : state.product;
      if (storage == nullptr || query.max_referenced_bytes == 0) continue;
      entry.storage = *storage;
      storages.push_back(*storage);
      referenced += (*storage)->size();
    }
  }
  if (storages.empty()) return part;
  MS_ASSIGN_OR_RETURN(part.held, ledger_->HoldSlots(std::move(storages)));
  if (part.held == nullptr) return DeletedError();
  return part;
}

}  // namespace modelstate
