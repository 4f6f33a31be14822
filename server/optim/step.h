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
#include "server/state/module_version.h"
#include "server/state/optimizer_config.h"
#include "server/state/optimizer_state.h"

namespace modelstate {

struct StepOptions {
  // Gradients are divided by this first.
  std::optional<double> grad_scale;
  // Per group, complete: Optimizer::Resolve.
  std::vector<Hyperparameters> hyperparameters;
};

struct StepResult {
  // False: a gradient has an element that is not finite; nothing was changed.
  bool applied = false;
  double grad_norm = 0;  // after grad_scale, before clipping
  double clip_coef = 1;
  std::vector<std::string> nonfinite;  // names, the first 10
  uint64_t updated = 0;
  uint64_t skipped = 0;  // trainable parameters without a gradient
  // The new storages by schema index (null: unchanged), gradients' storages reused where widths
  // allow.
  std::vector<StorageRef> storages;
};

// One optimizer step over `current`.
//
// Everything that can fail comes first: slots that do not exist yet or that somebody else holds are
// allocated, the norm is computed and the gradients are checked to be finite, all before the first
// write to optimizer state. After that it cannot fail: so either `state` is as before and the
// result is an error or not applied, or `state` and result belong to the next version.
//
// Numbers: CPU scalars in double, elementwise arithmetic in f32 (f64 for F64 parameters) without
// fused multiply-add, the norm as double sums over fixed 4096-element blocks in a fixed tree. So
// the result does not depend on the number of threads. The rules are in update_rules.h.
//
// REQUIRES: device().host_visible(); `optimizer` resolved against current.schema; `gradients`
// matched with current.schema; `state.parameters` sized as the schema. Runs on the module's strand;
// uses `compute` and returns when done.
absl::StatusOr<StepResult> ApplyOptimizerStep(const ModuleVersion& current,
                                              const Optimizer& optimizer,
                                              const StepOptions& options, GradientSet gradients,
                                              OptimizerState& state, ComputePool& compute);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_STEP_H_
