#include "server/optim/step_plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

// Enough to be worth a hand-over, small enough to balance.
constexpr uint64_t kElementsPerBatch = 16 * kBlockElements;

// One gradient of one part of a contribution.
struct Found {
  uint32_t index;  // in the schema
  uint32_t order;  // of the part, counted over all contributions
  GradientSet::Entry* entry;
  DType dtype;
};

// What belongs to a part, in the order in which they are added.
struct PartFactors {
  double inverse_scale;
  double coefficient;
};

// In schema order, and for each parameter in the order of the parts.
std::vector<Found> FindGradients(const ModuleSchema& schema,
                                 std::vector<Contribution>& contributions) {
  std::vector<Found> found;
  size_t count = 0;
  for (const Contribution& contribution : contributions) {
    for (const ScaledGradients& part : contribution.parts) count += part.gradients.entries.size();
  }
  found.reserve(count);
  uint32_t order = 0;
  for (Contribution& contribution : contributions) {
    for (ScaledGradients& part : contribution.parts) {
      for (GradientSet::Entry& entry : part.gradients.entries) {
        if (schema.spec(entry.index).kind != TensorKind::kParameter) continue;
        found.push_back({entry.index, order, &entry, part.gradients.tensors[entry.tensor].dtype});
      }
      ++order;
    }
  }
  // Most often this order already.
  const auto by_place = [](const Found& a, const Found& b) {
    return std::pair(a.index, a.order) < std::pair(b.index, b.order);
  };
  if (!std::is_sorted(found.begin(), found.end(), by_place)) {
    std::sort(found.begin(), found.end(), by_place);
  }
  return found;
}

// Where the new parameter goes: over a gradient of its width, or into what was staged for it. Null:
// there is neither.
RefPtr<TensorStorage> FindOutput(const TensorSpec& spec, absl::Span<const Found> parts) {
  for (const bool over_gradient : {true, false}) {
    for (const Found& found : parts) {
      const RefPtr<TensorStorage>& storage =
          over_gradient ? found.entry->storage : found.entry->output;
      if (storage && storage->size() == spec.nbytes() && storage->IsSoleReference()) return storage;
    }
  }
  return nullptr;
}

// Calls visit(parts of one parameter) for each, in schema order, until one returns an error.
template <typename Visitor>
absl::Status ForEachParameter(absl::Span<const Found> found, Visitor visit) {
  for (size_t begin = 0, end = 0; begin < found.size(); begin = end) {
    while (end < found.size() && found[end].index == found[begin].index) ++end;
    MS_RETURN_IF_ERROR(visit(found.subspan(begin, end - begin)));
  }
  return absl::OkStatus();
}

absl::Status NotInAGroup(const TensorSpec& spec) {
  return MakeError(Reason::kNotInAGroup,
                   absl::StrCat("parameter \"", spec.name,
                                "\" is in no group of the optimizer; leave its gradient out, or "
                                "name it in a group with ConfigureOptimizer"),
                   {{"tensor", spec.name}});
}

}  // namespace

absl::StatusOr<StepPlan> MakeStepPlan(const ModuleVersion& current, const Optimizer& optimizer,
                                      const StepOptions& options,
                                      std::vector<Contribution>& contributions,
                                      const OptimizerState& state) {
  const ModuleSchema& schema = *current.schema;
  double total_weight = 0;
  for (const Contribution& contribution : contributions) total_weight += contribution.weight;
  std::vector<PartFactors> factors;
  for (const Contribution& contribution : contributions) {
    for (const ScaledGradients& part : contribution.parts) {
      if (part.gradients.schema != current.schema) {
        return absl::InternalError("a step was given gradients of another schema");
      }
      factors.push_back({1 / part.grad_scale, contribution.weight / total_weight});
    }
  }
  if (state.parameters.size() != schema.size() ||
      options.hyperparameters.size() != optimizer.groups().size()) {
    return absl::InternalError("a step was given state or hyper-parameters of another schema");
  }
  StepPlan plan;
  plan.algorithm = optimizer.algorithm();
  plan.options = &options;
  plan.clip_value = optimizer.config().max_grad_value.value_or(0);
  const RuleInfo& rule = GetRule(plan.algorithm);
  const std::vector<Found> found = FindGradients(schema, contributions);
  plan.parts.reserve(found.size());
  plan.tensors.reserve(found.size());
  MS_RETURN_IF_ERROR(ForEachParameter(found, [&](absl::Span<const Found> parts) -> absl::Status {
    const uint32_t index = parts.front().index;
    const TensorSpec& spec = schema.spec(index);
    const StorageRef& parameter = current.storages[index];
    const ParameterState& before = state.parameters[index];
    TensorStep tensor;
    tensor.index = index;
    tensor.dtype = spec.dtype;
    tensor.elements = static_cast<uint64_t>(spec.shape.num_elements());
    tensor.group = optimizer.group_of(index);
    if (tensor.group == Optimizer::kNoGroup) return NotInAGroup(spec);
    tensor.output_storage = FindOutput(spec, parts);
    if (parameter->size() != spec.nbytes() || !tensor.output_storage) {
      return absl::InternalError(
          absl::StrCat("nothing was staged that can take the new \"", spec.name, "\""));
    }
    tensor.parameter = parameter->HostBytes().data();
    tensor.output = tensor.output_storage->MutableHostBytes().data();
    tensor.first_part = static_cast<uint32_t>(plan.parts.size());
    tensor.part_count = static_cast<uint32_t>(parts.size());
    for (const Found& part : parts) {
      if (part.entry->storage->size() != tensor.elements * DTypeSize(part.dtype)) {
        return absl::InternalError(
            absl::StrCat("the gradient of \"", spec.name, "\" has not its own size"));
      }
      const PartFactors& factor = factors[part.order];
      plan.parts.push_back({part.entry->storage->HostBytes().data(), part.dtype,
                            factor.inverse_scale, factor.coefficient});
    }
    const GradientPart& first = plan.parts[tensor.first_part];
    const bool computed_as_stored = spec.dtype == DType::kF32 || spec.dtype == DType::kF64;
    tensor.in_place = tensor.part_count == 1 && parts[0].entry->storage == tensor.output_storage &&
                      first.dtype == spec.dtype && computed_as_stored && first.inverse_scale == 1 &&
                      first.coefficient == 1;

    tensor.step = before.step + 1;
    const Hyperparameters& h = options.hyperparameters[tensor.group];
    tensor.product = rule.next_product(h, tensor.step, before.product);
    const TensorStep* last = plan.tensors.empty() ? nullptr : &plan.tensors.back();
    if (last == nullptr || last->group != tensor.group || last->step != tensor.step ||
        last->product != tensor.product) {
      plan.scalars.push_back(rule.make_scalars(h, tensor.step, tensor.product));
    }
    tensor.scalars = static_cast<uint32_t>(plan.scalars.size() - 1);
    plan.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }));
  return plan;
}

absl::Status EnsureOutputs(const ModuleSchema& schema, Device& device, MemoryBudget& push_budget,
                           std::vector<Contribution>& contributions) {
  std::vector<GradientSet::Entry*> missing;
  uint64_t bytes = 0;
  const std::vector<Found> found = FindGradients(schema, contributions);
  MS_RETURN_IF_ERROR(ForEachParameter(found, [&](absl::Span<const Found> parts) {
    const TensorSpec& spec = schema.spec(parts.front().index);
    if (!FindOutput(spec, parts)) {
      missing.push_back(parts.front().entry);
      bytes += spec.nbytes();
    }
    return absl::OkStatus();
  }));
  if (missing.empty()) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(MemoryBudget::Reservation reservation, push_budget.Reserve(bytes));
  std::vector<RefPtr<TensorStorage>> outputs;
  for (const GradientSet::Entry* entry : missing) {
    MS_ASSIGN_OR_RETURN(outputs.emplace_back(),
                        TensorStorage::Allocate(device, schema.spec(entry->index).nbytes()));
  }
  for (size_t i = 0; i < missing.size(); ++i) missing[i]->output = std::move(outputs[i]);
  contributions.front().parts.front().gradients.of_outputs.push_back(std::move(reservation));
  return absl::OkStatus();
}

absl::Status CheckGroups(const Optimizer& optimizer, const GradientSet& gradients) {
  for (const GradientSet::Entry& entry : gradients.entries) {
    const TensorSpec& spec = gradients.schema->spec(entry.index);
    if (spec.kind != TensorKind::kParameter) continue;
    if (optimizer.group_of(entry.index) == Optimizer::kNoGroup) return NotInAGroup(spec);
  }
  return absl::OkStatus();
}

absl::Status AllocateSlots(const Optimizer& optimizer, OptimizerState& state, Device& device,
                           StepPlan* plan) {
  const std::span<const SlotRule> rules = GetRule(plan->algorithm).slots;
  SlotList kept;
  for (size_t t = 0; t < plan->tensors.size(); ++t) {
    TensorStep& tensor = plan->tensors[t];
    const Hyperparameters& h = plan->options->hyperparameters[tensor.group];
    if (t == 0 || tensor.group != plan->tensors[t - 1].group ||
        tensor.dtype != plan->tensors[t - 1].dtype) {
      kept = KeptSlots(optimizer.config(), h, tensor.dtype);
    }
    for (const SlotInfo& info : kept) {
      const uint64_t bytes = tensor.elements * DTypeSize(info.dtype);
      RefPtr<TensorStorage>& held = state.parameters[tensor.index].slots[info.place];
      if (held && held->size() != bytes) {
        return absl::InternalError(
            absl::StrCat("optimizer state ", info.name, " does not have its parameter's size"));
      }
      PlannedSlot& slot = tensor.slots[info.place];
      if (held && held->IsSoleReference()) {
        slot.data = held->MutableHostBytes().data();
        slot.from = slot.data;
        continue;
      }
      MS_ASSIGN_OR_RETURN(slot.storage, TensorStorage::Allocate(device, bytes));
      slot.data = slot.storage->MutableHostBytes().data();
      slot.from = held ? held->HostBytes().data() : nullptr;
      if (info.place != kMasterPlace && rules[info.place - 1].initial != nullptr) {
        slot.initial = rules[info.place - 1].initial(h);
      }
    }
  }
  return absl::OkStatus();
}

WorkList MakeWorkList(const StepPlan& plan) {
  WorkList work;
  work.items.reserve(plan.tensors.size());
  uint64_t in_batch = 0;
  for (uint32_t t = 0; t < plan.tensors.size(); ++t) {
    const uint64_t elements = plan.tensors[t].elements;
    for (uint64_t begin = 0; begin < elements;) {
      const uint64_t end = std::min(elements, begin + kElementsPerBatch);
      work.items.push_back({t, begin, end});
      in_batch += end - begin;
      if (in_batch >= kElementsPerBatch) {
        work.batch_ends.push_back(work.items.size());
        in_batch = 0;
      }
      begin = end;
    }
  }
  if (in_batch > 0) work.batch_ends.push_back(work.items.size());
  return work;
}

}  // namespace modelstate
