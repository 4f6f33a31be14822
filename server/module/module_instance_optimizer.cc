// What of ModuleInstance sets and shows the optimizer.
#include <algorithm>
#include <asio/post.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"

namespace modelstate {
namespace {

// Whether a step finds the same optimizer state under both: then it may be kept.
bool SameSlots(const Optimizer& before, const Optimizer& after, uint32_t index, DType dtype) {
  if (before.algorithm() != after.algorithm()) return false;
  const auto slots = [index, dtype](const Optimizer& optimizer) {
    return OptimizerSlots(optimizer.algorithm(),
                          optimizer.groups()[optimizer.group_of(index)].hyperparameters, dtype);
  };
  const std::vector<SlotInfo> a = slots(before);
  const std::vector<SlotInfo> b = slots(after);
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const SlotInfo& x, const SlotInfo& y) {
                      return absl::string_view(x.name) == y.name && x.dtype == y.dtype;
                    });
}

}  // namespace

absl::StatusOr<VersionRef> ModuleInstance::ConfigureOnStrand(const OptimizerConfig& config,
                                                             bool reset_state) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
  const VersionRef current = Current();
  const ModuleSchema& schema = *current->schema;
  if (schema.empty()) return EmptyError();
  if (config.quorum > 1) {
    return MakeError(
        Reason::kNotImplemented,
        absl::StrCat(
            "rounds.quorum is ", config.quorum,
            ": rounds of more than one contribution are not built yet; leave it out, or set 1"));
  }
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const Optimizer> next_optimizer,
                      Optimizer::Create(config, schema));
  const std::shared_ptr<const Optimizer> before = optimizer();
  for (uint32_t index = 0; index < schema.size(); ++index) {
    ParameterState& state = optimizer_state_.parameters[index];
    if (schema.spec(index).kind != TensorKind::kParameter || state.step == 0) continue;
    if (reset_state || before == nullptr ||
        !SameSlots(*before, *next_optimizer, index, schema.spec(index).dtype)) {
      state = ParameterState();
    }
  }
  VersionChange change;
  change.set_detail(
      absl::StrCat(AlgorithmName(config.algorithm), reset_state ? ", state reset" : ""));
  Publish(NextVersion(MutationKind::kConfigureOptimizer), std::move(next_optimizer),
          std::move(change));
  return Current();
}

void ModuleInstance::ReadOptimizerState(OptimizerStateQuery query, Done<OptimizerStatePart> done) {
  asio::post(strand_,
             [self = shared_from_this(), query = std::move(query),
              done = std::move(done)]() mutable { done(self->OptimizerStateOnStrand(query)); });
}

absl::StatusOr<OptimizerStatePart> ModuleInstance::OptimizerStateOnStrand(
    const OptimizerStateQuery& query) {
  MS_RETURN_IF_ERROR(CheckNotDeleted());
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
    return MakeError(
        Reason::kNoOptimizer,
        absl::StrCat("module \"", name_, "\" has no optimizer: call ConfigureOptimizer first"),
        {{"module", name_}});
  }
  if (part.schema != query.schema) {
    return MakeError(Reason::kStaleBase,
                     absl::StrCat("the tensors of module \"", name_,
                                  "\" changed while they were listed: list again"),
                     {{"module", name_}});
  }
  const std::vector<uint32_t>& parameters = *query.parameters;
  const auto slots_of = [](const ParameterState& state) {
    uint64_t slots = 0;
    for (const RefPtr<TensorStorage>& slot : state.slots) slots += slot ? 1 : 0;
    return slots;
  };
  if (query.count) {
    for (uint32_t index : parameters) {
      const ParameterState& state = optimizer_state_.parameters[index];
      if (state.step > 0) part.count += 1 + slots_of(state);
    }
  }
  uint64_t referenced = 0;
  std::vector<StorageRef> storages;
  auto it = std::lower_bound(parameters.begin(), parameters.end(), query.from.parameter);
  for (; it != parameters.end() && !part.next; ++it) {
    const ParameterState& state = optimizer_state_.parameters[*it];
    if (state.step == 0) continue;
    for (uint32_t slot = *it == query.from.parameter ? query.from.slot : 0; slot <= kMaxSlots;
         ++slot) {
      const RefPtr<TensorStorage>* storage = slot == 0 ? nullptr : &state.slots[slot - 1];
      if (storage != nullptr && !*storage) continue;
      const bool full = query.max_referenced_bytes > 0 && referenced >= query.max_referenced_bytes;
      if (part.entries.size() >= query.max_entries || full) {
        part.next = OptimizerStatePlace{*it, slot};
        break;
      }
      OptimizerStatePart::Entry& entry = part.entries.emplace_back();
      entry.place = {*it, slot};
      entry.step = state.step;
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
