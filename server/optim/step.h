#ifndef MODELSTATE_SERVER_OPTIM_STEP_H_
#define MODELSTATE_SERVER_OPTIM_STEP_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/compute_pool.h"
#include "server/optim/gradient_set.h"
#include "server/optim/instruction_set.h"
#include "server/optim/step_executor.h"
#include "server/state/module_version.h"
#include "server/state/optimizer.h"
#include "server/state/optimizer_state.h"

namespace modelstate {

struct StepOptions {
  // Per group, complete: Optimizer::Resolve.
  std::vector<Hyperparameters> hyperparameters;
  // Of an executor that is made for this step. The bits are the same for all; nullopt: the best
  // that this machine has.
  std::optional<InstructionSet> instruction_set;
  // For the place of a new parameter that no gradient has the width for, where none was staged with
  // it. Null: all were.
  MemoryBudget* output_budget = nullptr;
  // Of the module's device. Null: one is made for this step.
  StepExecutor* executor = nullptr;
};

// Gradients that were multiplied by grad_scale.
struct ScaledGradients {
  GradientSet gradients;
  double grad_scale = 1;
};

// What one worker brings to a step: the sum of the parts (what was accumulated, and the last push).
struct Contribution {
  std::vector<ScaledGradients> parts;
  double weight = 1;  // in the mean
};

struct StepResult {
  // False: a gradient has an element that is not finite; nothing was changed.
  bool applied = false;
  double grad_norm = 0;  // after grad_scale, before clipping
  double clip_coef = 1;
  std::vector<std::string> nonfinite;  // names, the first 10
  uint64_t updated = 0;
  uint64_t skipped = 0;  // trainable parameters in a group without a gradient
  // The new storages by schema index (null: unchanged), gradients' storages reused where widths
  // allow.
  std::vector<StorageRef> storages;
  uint64_t new_state_bytes = 0;  // of slots that did not exist before
};

// One optimizer step over `current`.
//
// The gradient is the mean of the contributions by weight, added in their order and that of their
// parts: each tensor is multiplied by 1 / grad_scale and by weight / (sum of the weights), both
// rounded to the type that the step computes in. A tensor that only some have counts as zero for
// the others. Buffer values are those of the first contribution that has any, of its last part that
// has.
//
// Everything that can fail comes first: slots that do not exist yet or that somebody else holds and
// places for new parameters are allocated, the norm is computed and the gradients are checked to be
// finite, all before the first write to optimizer state. After that it cannot fail: so either
// `state` and `contributions` are as before and the result is an error or not applied, or `state`
// and result belong to the next version and the gradients are consumed.
//
// Numbers: CPU scalars in double, elementwise arithmetic in F32 (F64 for F64 parameters) without
// fused multiply-add, the norm as double sums over fixed 4096-element blocks in a fixed tree. So
// the result does not depend on the number of threads, nor on the instruction set. The rules are in
// server/rules.
//
// FAILED_PRECONDITION NOT_IN_A_GROUP; INVALID_ARGUMENT INVALID_FIELD (weights whose sum is not
// finite, CheckWeightAndScale); RESOURCE_EXHAUSTED PUSH_MEMORY (of outputs), DEVICE_MEMORY.
//
// Where the device fails (INTERNAL, and its health() is no longer OK) nothing that it holds is to
// be trusted, `state` included.
//
// REQUIRES: `optimizer` resolved against current.schema; at least one
// contribution, all matched with current.schema; `state.parameters` sized as the schema. Runs on
// the module's strand; uses `compute` and returns when done.
absl::StatusOr<StepResult> ApplyOptimizerStep(const ModuleVersion& current,
                                              const Optimizer& optimizer,
                                              const StepOptions& options,
                                              std::vector<Contribution>& contributions,
                                              OptimizerState& state, ComputePool& compute);

// FAILED_PRECONDITION NOT_IN_A_GROUP for a gradient of a parameter that no group has.
absl::Status CheckGroups(const Optimizer& optimizer, const GradientSet& gradients);

// INVALID_ARGUMENT INVALID_FIELD: both are computed with as 32-bit floats, so both must be positive
// and finite there (of grad_scale, its reciprocal too).
absl::Status CheckWeightAndScale(double weight, double grad_scale);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_STEP_H_
