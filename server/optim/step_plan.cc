#include "server/optim/step_plan.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/base/status.h"
#include "server/optim/default_arithmetic.h"

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
  bool norms_apply;  // the norms that came with it are those of the part as it is added
};

absl::Status FirstError(std::vector<absl::Status> statuses) {
  for (absl::Status& status : statuses) MS_RETURN_IF_ERROR(std::move(status));
  return absl::OkStatus();
}

// Calls task(begin, end) for [0, count) in pieces of kTensorsPerTask, on all threads. The first
// error in the order of the pieces.
template <typename Task>
absl::Status TryEachPiece(size_t count, ComputePool& compute, Task task) {
  std::vector<absl::Status> statuses((count + kTensorsPerTask - 1) / kTensorsPerTask);
  ForEachPiece(count, compute, [&](size_t begin, size_t end) {
    statuses[begin / kTensorsPerTask] = task(begin, end);
  });
  return FirstError(std::move(statuses));
}

size_t CountEntries(absl::Span<const Contribution> contributions) {
  size_t count = 0;
  for (const Contribution& contribution : contributions) {
    for (const ScaledGradients& part : contribution.parts) count += part.gradients.entries.size();
  }
  return count;
}

// In schema order, and for each parameter in the order of the parts.
std::vector<Found> FindGradients(const ModuleSchema& schema,
                                 std::vector<Contribution>& contributions, ComputePool& compute) {
  std::vector<Found> found(CountEntries(contributions));
  uint32_t order = 0;
  size_t first = 0;
  for (Contribution& contribution : contributions) {
    for (ScaledGradients& part : contribution.parts) {
      std::vector<GradientSet::Entry>& entries = part.gradients.entries;
      ForEachPiece(entries.size(), compute, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
          GradientSet::Entry& entry = entries[i];
          if (schema.spec(entry.index).kind != TensorKind::kParameter) continue;
          found[first + i] = {entry.index, order, &entry,
                              part.gradients.tensors[entry.tensor].dtype};
        }
      });
      first += entries.size();
      ++order;
    }
  }
  std::erase_if(found, [](const Found& tensor) { return tensor.entry == nullptr; });
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
RefPtr<TensorStorage>* FindOutput(const TensorSpec& spec, absl::Span<const Found> parts) {
  for (const bool over_gradient : {true, false}) {
    for (const Found& found : parts) {
      RefPtr<TensorStorage>& storage = over_gradient ? found.entry->storage : found.entry->output;
      if (storage && storage->size() == spec.nbytes() && storage->IsSoleReference()) {
        return &storage;
      }
    }
  }
  return nullptr;
}

void SetOutput(RefPtr<TensorStorage>* storage, TensorStep* tensor) {
  tensor->output_storage = storage;
  tensor->output = (*storage)->MutableBuffer().data();
}

// Where in `found` the parts of each parameter begin, and its end.
std::vector<uint32_t> FirstParts(absl::Span<const Found> found) {
  std::vector<uint32_t> first;
  first.reserve(found.size() + 1);
  for (uint32_t i = 0; i < found.size(); ++i) {
    if (i == 0 || found[i].index != found[i - 1].index) first.push_back(i);
  }
  first.push_back(static_cast<uint32_t>(found.size()));
  return first;
}

// A parameter whose new value has no place yet, and the entry that will own it.
struct MissingOutput {
  uint32_t tensor;
  GradientSet::Entry* entry;
};

absl::Status AllocateOutputs(std::vector<MissingOutput> missing, const ModuleVersion& current,
                             MemoryBudget& budget, GradientSet& owner, StepPlan* plan) {
  const ModuleSchema& schema = *current.schema;
  uint64_t bytes = 0;
  for (const MissingOutput& output : missing) bytes += schema.spec(output.entry->index).nbytes();
  MS_ASSIGN_OR_RETURN(MemoryBudget::Reservation reservation, budget.Reserve(bytes));
  std::vector<RefPtr<TensorStorage>> storages;
  for (const MissingOutput& output : missing) {
    MS_ASSIGN_OR_RETURN(
        storages.emplace_back(),
        TensorStorage::Allocate(*current.device, schema.spec(output.entry->index).nbytes()));
  }
  for (size_t i = 0; i < missing.size(); ++i) {
    missing[i].entry->output = std::move(storages[i]);
    SetOutput(&missing[i].entry->output, &plan->tensors[missing[i].tensor]);
  }
  owner.of_outputs.push_back(std::move(reservation));
  return absl::OkStatus();
}

absl::Status NotInAGroup(const TensorSpec& spec) {
  return MakeError(Reason::kNotInAGroup,
                   absl::StrCat("parameter \"", spec.name,
                                "\" is in no group of the optimizer; leave its gradient out, or "
                                "name it in a group with ConfigureOptimizer"),
                   {{"tensor", spec.name}});
}

// The product of the tensor before, which most tensors have too.
struct ProductMemo {
  uint32_t group = Optimizer::kNoGroup;
  uint64_t step = 0;
  float before = 0;
  float after = 0;
};

}  // namespace

absl::StatusOr<StepPlan> MakeStepPlan(const ModuleVersion& current, const Optimizer& optimizer,
                                      const StepOptions& options,
                                      std::vector<Contribution>& contributions,
                                      OptimizerState& state, ComputePool& compute) {
  const ModuleSchema& schema = *current.schema;
  double total_weight = 0;
  for (const Contribution& contribution : contributions) total_weight += contribution.weight;
  std::vector<PartFactors> factors;
  for (const Contribution& contribution : contributions) {
    for (const ScaledGradients& part : contribution.parts) {
      if (part.gradients.schema != current.schema) {
        return absl::InternalError("a step was given gradients of another schema");
      }
      const double coefficient = contribution.weight / total_weight;
      factors.push_back({1 / part.grad_scale, coefficient,
                         coefficient == 1 && part.gradients.norm_scale == part.grad_scale});
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
  const std::vector<Found> found = FindGradients(schema, contributions, compute);
  const std::vector<uint32_t> first_parts = FirstParts(found);
  plan.has_buffers = found.size() < CountEntries(contributions);
  plan.parts.resize(found.size());
  const size_t count = first_parts.size() - 1;
  plan.tensor_memory = std::make_unique_for_overwrite<TensorStep[]>(count);
  plan.tensors = absl::MakeSpan(plan.tensor_memory.get(), count);
  plan.new_slots.resize((count + kTensorsPerTask - 1) / kTensorsPerTask);
  std::vector<MissingOutput> missing_outputs;
  std::atomic<bool> norms_known = true;
  absl::Mutex mutex;  // of what all pieces add to

  const auto plan_tensor = [&](size_t t, ProductMemo& memo) -> absl::Status {
    const absl::Span<const Found> parts =
        absl::MakeConstSpan(found).subspan(first_parts[t], first_parts[t + 1] - first_parts[t]);
    const uint32_t index = parts.front().index;
    const TensorSpec& spec = schema.spec(index);
    const StorageRef& parameter = current.storages[index];
    const ParameterState& before = state.parameters[index];
    TensorStep& tensor = plan.tensors[t];
    tensor = TensorStep();
    tensor.index = index;
    tensor.dtype = spec.dtype;
    tensor.elements = static_cast<uint64_t>(spec.shape.num_elements());
    tensor.group = optimizer.group_of(index);
    if (tensor.group == Optimizer::kNoGroup) return NotInAGroup(spec);
    if (parameter->size() != spec.nbytes()) {
      return absl::InternalError(absl::StrCat("\"", spec.name, "\" has not its own size"));
    }
    tensor.parameter = parameter->buffer().data();
    if (RefPtr<TensorStorage>* const output = FindOutput(spec, parts)) {
      SetOutput(output, &tensor);
    } else if (options.output_budget != nullptr) {
      absl::MutexLock lock(&mutex);
      missing_outputs.push_back({static_cast<uint32_t>(t), parts.front().entry});
    } else {
      return absl::InternalError(
          absl::StrCat("nothing was staged that can take the new \"", spec.name, "\""));
    }
    tensor.first_part = first_parts[t];
    tensor.part_count = static_cast<uint32_t>(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      const TensorStorage& storage = *parts[i].entry->storage;
      if (storage.size() != tensor.elements * DTypeSize(parts[i].dtype)) {
        return absl::InternalError(
            absl::StrCat("the gradient of \"", spec.name, "\" has not its own size"));
      }
      const PartFactors& factor = factors[parts[i].order];
      plan.parts[tensor.first_part + i] = {storage.buffer().data(), parts[i].dtype,
                                           factor.inverse_scale, factor.coefficient};
    }
    const GradientPart& first = plan.parts[tensor.first_part];
    const bool computed_as_stored = spec.dtype == DType::kF32 || spec.dtype == DType::kF64;
    tensor.in_place = tensor.part_count == 1 && first.data == tensor.output &&
                      first.dtype == spec.dtype && computed_as_stored && first.inverse_scale == 1 &&
                      first.coefficient == 1;
    const GradientSet::Entry& entry = *parts.front().entry;
    if (parts.size() == 1 && factors[parts.front().order].norms_apply && entry.norm) {
      tensor.norm = &*entry.norm;
    }
    tensor.step = before.step + 1;
    if (memo.group != tensor.group || memo.step != tensor.step || memo.before != before.product) {
      memo = {
          tensor.group, tensor.step, before.product,
          rule.next_product(options.hyperparameters[tensor.group], tensor.step, before.product)};
    }
    tensor.product = memo.after;
    return absl::OkStatus();
  };
  // In place where nobody else holds it.
  const auto plan_slots = [&](const SlotList& kept, size_t t) -> absl::Status {
    TensorStep& tensor = plan.tensors[t];
    for (const SlotInfo& info : kept) {
      const uint64_t bytes = tensor.elements * DTypeSize(info.dtype);
      const RefPtr<TensorStorage>& held = state.parameters[tensor.index].slots[info.place];
      if (held && held->size() != bytes) {
        return absl::InternalError(
            absl::StrCat("optimizer state ", info.name, " does not have its parameter's size"));
      }
      if (held && held->IsSoleReference()) {
        uint8_t* const data = held->MutableBuffer().data();
        tensor.slots[info.place] = {data, data, 0};
      } else {
        plan.new_slots[t / kTensorsPerTask].push_back(
            {static_cast<uint32_t>(t), info.place, bytes, nullptr});
      }
    }
    return absl::OkStatus();
  };
  MS_RETURN_IF_ERROR(
      TryEachPiece(plan.tensors.size(), compute, [&](size_t begin, size_t end) -> absl::Status {
        const DefaultArithmetic arithmetic;
        SlotList kept;
        ProductMemo memo;
        bool known = true;
        for (size_t t = begin; t < end; ++t) {
          MS_RETURN_IF_ERROR(plan_tensor(t, memo));
          TensorStep& tensor = plan.tensors[t];
          known = known && tensor.norm != nullptr;
          const TensorStep* last = t == begin ? nullptr : &plan.tensors[t - 1];
          if (last == nullptr || tensor.group != last->group || tensor.dtype != last->dtype) {
            kept =
                KeptSlots(optimizer.config(), options.hyperparameters[tensor.group], tensor.dtype);
          }
          MS_RETURN_IF_ERROR(plan_slots(kept, t));
          if (last != nullptr && last->group == tensor.group && last->step == tensor.step &&
              last->product == tensor.product) {
            tensor.scalars = last->scalars;
            continue;
          }
          const RuleScalars scalars =
              rule.make_scalars(options.hyperparameters[tensor.group], tensor.step, tensor.product);
          absl::MutexLock lock(&mutex);
          tensor.scalars = static_cast<uint32_t>(plan.scalars.size());
          plan.scalars.push_back(scalars);
        }
        if (!known) norms_known = false;
        return absl::OkStatus();
      }));
  plan.norms_known = norms_known;
  std::sort(missing_outputs.begin(), missing_outputs.end(),
            [](const MissingOutput& a, const MissingOutput& b) { return a.tensor < b.tensor; });
  if (!missing_outputs.empty()) {
    MS_RETURN_IF_ERROR(AllocateOutputs(missing_outputs, current, *options.output_budget,
                                       contributions.front().parts.front().gradients, &plan));
  }
  return plan;
}

absl::Status CheckGroups(const Optimizer& optimizer, const GradientSet& gradients) {
  for (const GradientSet::Entry& entry : gradients.entries) {
    const TensorSpec& spec = gradients.schema->spec(entry.index);
    if (spec.kind != TensorKind::kParameter) continue;
    if (optimizer.group_of(entry.index) == Optimizer::kNoGroup) return NotInAGroup(spec);
  }
  return absl::OkStatus();
}

absl::Status AllocateSlots(const OptimizerState& state, Device& device, ComputePool& compute,
                           StepPlan* plan) {
  const std::span<const SlotRule> rules = GetRule(plan->algorithm).slots;
  std::vector<absl::Status> statuses(plan->new_slots.size());
  const auto allocate = [&](NewSlot& slot) -> absl::Status {
    MS_ASSIGN_OR_RETURN(slot.storage, TensorStorage::Allocate(device, slot.bytes));
    const TensorStep& tensor = plan->tensors[slot.tensor];
    const RefPtr<TensorStorage>& held = state.parameters[tensor.index].slots[slot.place];
    PlannedSlot& planned = plan->tensors[slot.tensor].slots[slot.place];
    planned.data = slot.storage->MutableBuffer().data();
    planned.from = held ? held->buffer().data() : nullptr;
    if (slot.place != kMasterPlace && rules[slot.place - 1].initial != nullptr) {
      planned.initial = rules[slot.place - 1].initial(plan->options->hyperparameters[tensor.group]);
    }
    return absl::OkStatus();
  };
  compute.ParallelFor(plan->new_slots.size(), [&](size_t piece) {
    std::vector<NewSlot>& slots = plan->new_slots[piece];
    // Place by place, so that what steps read in turn lies side by side.
    std::stable_sort(slots.begin(), slots.end(),
                     [](const NewSlot& a, const NewSlot& b) { return a.place < b.place; });
    for (NewSlot& slot : slots) {
      statuses[piece] = allocate(slot);
      if (!statuses[piece].ok()) return;
    }
  });
  return FirstError(std::move(statuses));
}

WorkList::WorkList(const StepPlan& plan, ComputePool& compute) : plan_(&plan) {
  const size_t count = plan.tensors.size();
  // A batch ends with its piece of tensors, so that each can be cut by itself.
  std::vector<std::vector<Position>> begins((count + kTensorsPerTask - 1) / kTensorsPerTask);
  ForEachPiece(count, compute, [&](size_t first, size_t last) {
    std::vector<Position>& of_piece = begins[first / kTensorsPerTask];
    uint64_t in_batch = kElementsPerBatch;
    for (uint32_t t = static_cast<uint32_t>(first); t < last; ++t) {
      const uint64_t elements = plan.tensors[t].elements;
      uint64_t begin = 0;
      do {
        if (in_batch >= kElementsPerBatch) {
          of_piece.push_back({t, begin});
          in_batch = 0;
        }
        const uint64_t end = PieceEnd(elements, begin);
        in_batch += end - begin;
        begin = end;
      } while (begin < elements);
    }
  });
  for (const std::vector<Position>& of_piece : begins) {
    begins_.insert(begins_.end(), of_piece.begin(), of_piece.end());
  }
  begins_.push_back({static_cast<uint32_t>(count), 0});
}

uint64_t WorkList::PieceEnd(uint64_t elements, uint64_t begin) {
  return std::min(elements, begin + kElementsPerBatch);
}

}  // namespace modelstate
