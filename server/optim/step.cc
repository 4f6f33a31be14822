#include "server/optim/step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/optim/block_kernels.h"
#include "server/optim/default_arithmetic.h"
#include "server/optim/step_plan.h"

namespace modelstate {
namespace {

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

Norm ComputeNorm(const StepPlan& plan, const WorkList& work, const ModuleSchema& schema,
                 const BlockKernels& kernels, ComputePool& compute) {
  std::vector<size_t> first_block(plan.tensors.size() + 1, 0);
  for (size_t t = 0; t < plan.tensors.size(); ++t) {
    first_block[t + 1] =
        first_block[t] + (plan.tensors[t].elements + kBlockElements - 1) / kBlockElements;
  }
  std::vector<BlockNorm> blocks(first_block.back());
  work.ForEachItem(compute, [&](const WorkItem& item) {
    for (uint64_t begin = item.begin; begin < item.end; begin += kBlockElements) {
      blocks[first_block[item.tensor] + begin / kBlockElements] = kernels.norm(
          plan, plan.tensors[item.tensor], begin, std::min(item.end, begin + kBlockElements));
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

// That a step could update.
uint64_t TrainableParameters(const ModuleSchema& schema, const Optimizer& optimizer,
                             ComputePool& compute) {
  std::atomic<uint64_t> total = 0;
  ForEachPiece(schema.size(), compute, [&](size_t begin, size_t end) {
    uint64_t count = 0;
    for (uint32_t i = static_cast<uint32_t>(begin); i < end; ++i) {
      const TensorSpec& spec = schema.spec(i);
      count += schema.owner(i) == i && spec.kind == TensorKind::kParameter && spec.requires_grad &&
               optimizer.group_of(i) != Optimizer::kNoGroup;
    }
    total += count;
  });
  return total;
}

}  // namespace

absl::Status CheckWeightAndScale(double weight, double grad_scale) {
  const auto usable = [](double value) {
    const float narrow = static_cast<float>(value);
    return std::isfinite(narrow) && narrow > 0;
  };
  if (!usable(grad_scale) || !usable(1 / grad_scale)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("grad_scale is ", grad_scale,
                                  "; gradients are multiplied by 1 / grad_scale, so both must be "
                                  "positive and finite as 32-bit floats"),
                     {{"field", "grad_scale"}});
  }
  if (!usable(weight)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("weight is ", weight,
                                  "; it must be positive and finite as a 32-bit float, also in the "
                                  "sum over a round; leave it out for 1"),
                     {{"field", "weight"}});
  }
  return absl::OkStatus();
}

absl::StatusOr<StepResult> ApplyOptimizerStep(const ModuleVersion& current,
                                              const Optimizer& optimizer,
                                              const StepOptions& options,
                                              std::vector<Contribution>& contributions,
                                              OptimizerState& state, ComputePool& compute) {
  const DefaultArithmetic arithmetic;  // of the scalars; the kernels have their own
  const ModuleSchema& schema = *current.schema;
  double total_weight = 0;
  for (const Contribution& contribution : contributions) {
    for (const ScaledGradients& part : contribution.parts) {
      MS_RETURN_IF_ERROR(CheckWeightAndScale(contribution.weight, part.grad_scale));
    }
    total_weight += contribution.weight;
  }
  MS_RETURN_IF_ERROR(CheckWeightAndScale(total_weight, 1));
  MS_ASSIGN_OR_RETURN(StepPlan plan,
                      MakeStepPlan(current, optimizer, options, contributions, state, compute));
  const BlockKernels& kernels =
      GetBlockKernels(options.instruction_set.value_or(SupportedInstructionSets().back()));

  StepResult result;
  const WorkList work(plan, compute);
  Norm norm = ComputeNorm(plan, work, schema, kernels, compute);
  result.grad_norm = norm.total;
  result.nonfinite = std::move(norm.nonfinite);
  if (!result.nonfinite.empty()) return result;
  if (const std::optional<double> max_norm = optimizer.config().max_grad_norm) {
    result.clip_coef = std::min(1.0, *max_norm / (norm.total + 1e-6));
    plan.clip_coef = result.clip_coef;
  }

  result.storages.resize(schema.size());
  MS_RETURN_IF_ERROR(AllocateSlots(optimizer, state, *current.device, compute, &plan));
  result.updated = plan.tensors.size();
  result.skipped = TrainableParameters(schema, optimizer, compute) - result.updated;

  // From here on nothing fails.
  work.ForEachItem(compute, [&](const WorkItem& item) {
    const TensorStep& tensor = plan.tensors[item.tensor];
    kernels.update(plan, tensor, item.begin, item.end);
    if (item.begin > 0) return;
    ParameterState& parameter = state.parameters[tensor.index];
    parameter.step = tensor.step;
    parameter.product = tensor.product;
    result.storages[tensor.index] = std::move(*tensor.output_storage);
  });
  for (NewSlot& slot : plan.new_slots) {
    state.parameters[slot.index].slots[slot.place] = std::move(slot.storage);
  }
  for (Contribution& contribution : contributions) {
    std::atomic<bool> any = false;
    for (ScaledGradients& part : contribution.parts) {
      std::vector<GradientSet::Entry>& entries = part.gradients.entries;
      ForEachPiece(entries.size(), compute, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
          if (schema.spec(entries[i].index).kind != TensorKind::kBuffer) continue;
          result.storages[entries[i].index] = std::move(entries[i].storage);
          any = true;
        }
      });
    }
    if (any) break;
  }
  contributions.clear();
  result.applied = true;
  return result;
}

}  // namespace modelstate
