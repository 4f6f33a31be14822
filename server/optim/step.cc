#include "server/optim/step.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/optim/block_update.h"
#include "server/optim/step_plan.h"

namespace modelstate {
namespace {

// Enough work to be worth a hand-over, small enough to balance.
constexpr uint64_t kElementsPerItem = 16 * kBlockElements;
constexpr size_t kNamesShown = 10;

struct Norm {
  double total = 0;
  std::vector<std::string> nonfinite;
};

// Sums neighbours, then neighbours of those: a tree that depends on the count alone.
double TreeSum(absl::Span<double> values) {  // overwrites them
  if (values.empty()) return 0;
  for (size_t count = values.size(); count > 1; count = (count + 1) / 2) {
    for (size_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 != 0) values[count / 2] = values[count - 1];
  }
  return values[0];
}

Norm ComputeNorm(const StepPlan& plan, const ModuleSchema& schema, double grad_scale,
                 ComputePool& compute) {
  std::vector<size_t> first_block(plan.tensors.size() + 1, 0);
  for (size_t t = 0; t < plan.tensors.size(); ++t) {
    first_block[t + 1] =
        first_block[t] + (plan.tensors[t].elements + kBlockElements - 1) / kBlockElements;
  }
  std::vector<BlockNorm> blocks(first_block.back());
  const std::vector<WorkItem> work = MakeWorkList(plan, kElementsPerItem);
  compute.ParallelFor(work.size(), [&](size_t w) {
    const WorkItem& item = work[w];
    for (uint64_t begin = item.begin; begin < item.end; begin += kBlockElements) {
      blocks[first_block[item.tensor] + begin / kBlockElements] = ComputeBlockNorm(
          plan.tensors[item.tensor], begin, std::min(item.end, begin + kBlockElements), grad_scale);
    }
  });

  Norm norm;
  std::vector<double> tensor_sums;
  tensor_sums.reserve(plan.tensors.size());
  std::vector<double> sums;
  for (size_t t = 0; t < plan.tensors.size(); ++t) {
    sums.clear();
    bool finite = true;
    for (size_t b = first_block[t]; b < first_block[t + 1]; ++b) {
      sums.push_back(blocks[b].sum_of_squares);
      finite &= blocks[b].finite;
    }
    tensor_sums.push_back(TreeSum(absl::MakeSpan(sums)));
    if (!finite && norm.nonfinite.size() < kNamesShown) {
      norm.nonfinite.push_back(schema.spec(plan.tensors[t].index).name);
    }
  }
  norm.total = std::sqrt(TreeSum(absl::MakeSpan(tensor_sums)));
  return norm;
}

absl::Status CheckGradScale(double scale) {
  const float narrow = static_cast<float>(scale);
  if (std::isfinite(narrow) && narrow > 0) return absl::OkStatus();
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("grad_scale is ", scale,
                                "; gradients are divided by it, so it must be positive and finite "
                                "as a 32-bit float"),
                   {{"field", "grad_scale"}});
}

uint64_t TrainableParameters(const ModuleSchema& schema) {
  uint64_t count = 0;
  for (uint32_t i = 0; i < schema.size(); ++i) {
    const TensorSpec& spec = schema.spec(i);
    count += schema.owner(i) == i && spec.kind == TensorKind::kParameter && spec.requires_grad;
  }
  return count;
}

}  // namespace

absl::StatusOr<StepResult> ApplyOptimizerStep(const ModuleVersion& current,
                                              const Optimizer& optimizer,
                                              const StepOptions& options, GradientSet gradients,
                                              OptimizerState& state, ComputePool& compute) {
  const ModuleSchema& schema = *current.schema;
  const double grad_scale = options.grad_scale.value_or(1);
  MS_RETURN_IF_ERROR(CheckGradScale(grad_scale));
  MS_ASSIGN_OR_RETURN(StepPlan plan, MakeStepPlan(current, optimizer, options, gradients, state));

  StepResult result;
  Norm norm = ComputeNorm(plan, schema, grad_scale, compute);
  result.grad_norm = norm.total;
  result.nonfinite = std::move(norm.nonfinite);
  if (!result.nonfinite.empty()) return result;
  if (const std::optional<double> max_norm = optimizer.config().max_grad_norm) {
    result.clip_coef = std::min(1.0, *max_norm / (norm.total + 1e-6));
  }

  result.storages.resize(schema.size());
  if (!plan.tensors.empty()) {
    Device& device = current.storages[plan.tensors.front().index]->device();
    MS_RETURN_IF_ERROR(AllocateSlots(state, device, &plan));
  }
  const std::vector<WorkItem> work = MakeWorkList(plan, kElementsPerItem);
  result.updated = plan.tensors.size();
  result.skipped = TrainableParameters(schema) - result.updated;

  // From here on nothing fails.
  compute.ParallelFor(work.size(), [&](size_t w) {
    const TensorStep& tensor = plan.tensors[work[w].tensor];
    UpdateBlocks(plan.algorithm, tensor, options.hyperparameters[tensor.group], grad_scale,
                 result.clip_coef, work[w].begin, work[w].end);
  });
  for (TensorStep& tensor : plan.tensors) {
    ParameterState& parameter = state.parameters[tensor.index];
    parameter.step = tensor.step;
    for (size_t i = 0; i < tensor.slot_count; ++i) {
      if (tensor.slots[i].storage) parameter.slots[i] = std::move(tensor.slots[i].storage);
    }
  }
  for (GradientSet::Entry& entry : gradients.entries) {
    result.storages[entry.index] = std::move(entry.storage);
  }
  result.applied = true;
  return result;
}

}  // namespace modelstate
