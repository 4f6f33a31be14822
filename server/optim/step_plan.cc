#include "server/optim/step_plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

SgdScalars<double> MakeSgdScalars(const Hyperparameters& h) {
  return {-*h.lr, *h.weight_decay, *h.momentum, 1 - *h.dampening};
}

// torch's scalar code: Python floats, the step as a float.
AdamWScalars<double> MakeAdamWScalars(const Hyperparameters& h, uint64_t step) {
  const double t = static_cast<double>(step);
  const double bias1 = 1 - std::pow(*h.beta1, t);
  const double bias2 = 1 - std::pow(*h.beta2, t);
  AdamWScalars<double> s;
  s.decay = 1 - *h.lr * *h.weight_decay;
  s.weight1 = 1 - *h.beta1;
  s.one_minus_weight1 = 1 - s.weight1;
  s.beta2 = *h.beta2;
  s.weight2 = 1 - *h.beta2;
  s.sqrt_bias2 = std::sqrt(bias2);
  s.eps = *h.eps;
  s.negative_step_size = -(*h.lr / bias1);
  return s;
}

}  // namespace

absl::StatusOr<StepPlan> MakeStepPlan(const ModuleVersion& current, const Optimizer& optimizer,
                                      const StepOptions& options, const GradientSet& gradients,
                                      const OptimizerState& state) {
  const ModuleSchema& schema = *current.schema;
  if (gradients.schema != current.schema || state.parameters.size() != schema.size() ||
      options.hyperparameters.size() != optimizer.groups().size()) {
    return absl::InternalError(
        "a step was given gradients, state or hyper-parameters that do not "
        "belong to the current schema");
  }
  StepPlan plan;
  plan.tensors.reserve(gradients.entries.size());
  plan.algorithm = optimizer.algorithm();
  plan.options = &options;
  for (size_t e = 0; e < gradients.entries.size(); ++e) {
    const GradientSet::Entry& entry = gradients.entries[e];
    const TensorSpec& spec = schema.spec(entry.index);
    const StorageRef& parameter = current.storages[entry.index];
    if (!entry.storage->IsSoleReference() || entry.storage->size() != spec.nbytes() ||
        parameter->size() != spec.nbytes()) {
      return absl::InternalError(
          absl::StrCat("the staged gradient of \"", spec.name, "\" cannot take the new parameter"));
    }
    if (spec.kind != TensorKind::kParameter) continue;
    TensorStep tensor;
    tensor.index = entry.index;
    tensor.entry = e;
    tensor.dtype = spec.dtype;
    tensor.elements = static_cast<uint64_t>(spec.shape.num_elements());
    tensor.parameter = parameter->HostBytes().data();
    tensor.gradient = entry.storage->MutableHostBytes().data();
    tensor.group = optimizer.group_of(entry.index);
    tensor.step = state.parameters[entry.index].step + 1;
    plan.tensors.push_back(std::move(tensor));
  }
  // So that sums over tensors do not depend on the order of the push, most often this one already.
  const auto by_index = [](const TensorStep& a, const TensorStep& b) { return a.index < b.index; };
  if (!std::is_sorted(plan.tensors.begin(), plan.tensors.end(), by_index)) {
    std::sort(plan.tensors.begin(), plan.tensors.end(), by_index);
  }

  const TensorStep* last = nullptr;
  for (TensorStep& tensor : plan.tensors) {
    const Hyperparameters& h = options.hyperparameters[tensor.group];
    if (plan.algorithm == Algorithm::kSgd) {
      tensor.sgd = MakeSgdScalars(h);
    } else if (last != nullptr && last->group == tensor.group && last->step == tensor.step) {
      tensor.adamw = last->adamw;
    } else {
      tensor.adamw = MakeAdamWScalars(h, tensor.step);
    }
    last = &tensor;
  }
  return plan;
}

absl::Status AllocateSlots(OptimizerState& state, Device& device, StepPlan* plan) {
  for (TensorStep& tensor : plan->tensors) {
    const std::vector<SlotInfo> slots =
        OptimizerSlots(plan->algorithm, plan->options->hyperparameters[tensor.group], tensor.dtype);
    tensor.slot_count = slots.size();
    for (size_t i = 0; i < slots.size(); ++i) {
      const uint64_t bytes = tensor.elements * DTypeSize(slots[i].dtype);
      RefPtr<TensorStorage>& held = state.parameters[tensor.index].slots[i];
      tensor.has_master |= absl::string_view(slots[i].name) == "master";
      if (held && held->size() != bytes) {
        return absl::InternalError(
            absl::StrCat("optimizer state ", slots[i].name, " does not have its parameter's size"));
      }
      PlannedSlot& slot = tensor.slots[i];
      if (held && held->IsSoleReference()) {
        slot.data = held->MutableHostBytes().data();
        slot.from = slot.data;
        continue;
      }
      MS_ASSIGN_OR_RETURN(slot.storage, TensorStorage::Allocate(device, bytes));
      slot.data = slot.storage->MutableHostBytes().data();
      slot.from = held ? held->HostBytes().data() : nullptr;
    }
  }
  return absl::OkStatus();
}

std::vector<WorkItem> MakeWorkList(const StepPlan& plan, uint64_t elements_per_item) {
  std::vector<WorkItem> work;
  for (uint32_t t = 0; t < plan.tensors.size(); ++t) {
    const uint64_t elements = plan.tensors[t].elements;
    for (uint64_t begin = 0; begin < elements; begin += elements_per_item) {
      work.push_back({t, begin, std::min(elements, begin + elements_per_item)});
    }
  }
  return work;
}

}  // namespace modelstate
