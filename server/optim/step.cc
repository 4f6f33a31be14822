#include "server/optim/step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/optim/default_arithmetic.h"
#include "server/optim/step_plan.h"
#include "server/optim/tree_sum.h"

namespace modelstate {
namespace {

constexpr size_t kNamesShown = 10;

struct Norm {
  double total = 0;
  std::vector<std::string> nonfinite;
};

absl::StatusOr<Norm> ComputeNorm(const StepPlan& plan, const ModuleSchema& schema,
                                 StepExecutor& executor, ComputePool& compute) {
  std::vector<TensorNorm> computed;
  if (!plan.norms_known) {
    MS_ASSIGN_OR_RETURN(computed, executor.ComputeNorms());
  }
  std::vector<double> sums(plan.tensors.size());
  std::atomic<bool> all_finite = true;
  const auto norm_of = [&](size_t t) -> const TensorNorm& {
    const TensorNorm* known = plan.tensors[t].norm;
    return known != nullptr ? *known : computed[t];
  };
  ForEachPiece(plan.tensors.size(), compute, [&](size_t begin, size_t end) {
    bool finite = true;
    for (size_t t = begin; t < end; ++t) {
      const TensorNorm& norm = norm_of(t);
      sums[t] = norm.sum_of_squares;
      finite = finite && norm.finite;
    }
    if (!finite) all_finite = false;
  });
  Norm norm;
  for (size_t t = 0; !all_finite && t < sums.size(); ++t) {
    if (norm_of(t).finite) continue;
    norm.nonfinite.push_back(schema.spec(plan.tensors[t].index).name);
    if (norm.nonfinite.size() == kNamesShown) break;
  }
  norm.total = std::sqrt(TreeSum(absl::MakeSpan(sums)));
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

// Those of the first contribution that has any, of its last part that has.
void TakeBuffers(const ModuleSchema& schema, std::vector<Contribution>& contributions,
                 ComputePool& compute, StepResult& result) {
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
    if (any) return;
  }
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
  std::unique_ptr<StepExecutor> made;
  if (options.executor == nullptr) {
    MS_ASSIGN_OR_RETURN(
        made,
        MakeStepExecutor(*current.device, compute,
                         options.instruction_set.value_or(SupportedInstructionSets().back())));
  }
  StepExecutor& executor = made != nullptr ? *made : *options.executor;
  MS_RETURN_IF_ERROR(AllocateSlots(state, *current.device, compute, &plan));
  MS_RETURN_IF_ERROR(executor.Prepare(plan));

  StepResult result;
  MS_ASSIGN_OR_RETURN(Norm norm, ComputeNorm(plan, schema, executor, compute));
  result.grad_norm = norm.total;
  result.nonfinite = std::move(norm.nonfinite);
  if (!result.nonfinite.empty()) return result;
  if (const std::optional<double> max_norm = optimizer.config().max_grad_norm) {
    result.clip_coef = std::min(1.0, *max_norm / (norm.total + 1e-6));
  }
  result.storages.resize(schema.size());
  result.updated = plan.tensors.size();
  result.skipped = TrainableParameters(schema, optimizer, compute) - result.updated;

  // From here on nothing fails but the device.
  MS_RETURN_IF_ERROR(executor.Update(result.clip_coef, [&](const TensorStep& tensor) {
    ParameterState& parameter = state.parameters[tensor.index];
    parameter.step = tensor.step;
    parameter.product = tensor.product;
    result.storages[tensor.index] = std::move(*tensor.output_storage);
  }));
  for (std::vector<NewSlot>& of_piece : plan.new_slots) {
    for (NewSlot& slot : of_piece) {
      RefPtr<TensorStorage>& held =
          state.parameters[plan.tensors[slot.tensor].index].slots[slot.place];
      if (!held) result.new_state_bytes += slot.bytes;
      held = std::move(slot.storage);
    }
  }
  if (plan.has_buffers) TakeBuffers(schema, contributions, compute, result);
  contributions.clear();
  result.applied = true;
  return result;
}

}  // namespace modelstate
