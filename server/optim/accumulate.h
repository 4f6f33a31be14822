#ifndef MODELSTATE_SERVER_OPTIM_ACCUMULATE_H_
#define MODELSTATE_SERVER_OPTIM_ACCUMULATE_H_

#include <optional>

#include "absl/status/status.h"
#include "server/optim/gradient_set.h"
#include "server/optim/step_executor.h"

namespace modelstate {

// Adds the gradients of `more`, each multiplied by 1 / grad_scale, to those of `total`, which is
// null for the first of them: what torch does when backward() is called again. The sum is F32, or
// F64 for an F64 parameter. Buffer values of `more` replace those of `total`. On an error `total`
// is as before. RESOURCE_EXHAUSTED PUSH_MEMORY, DEVICE_MEMORY. REQUIRES: both are matched with the
// same schema, on `device`, which `executor` is of; grad_scale is positive and finite.
absl::Status AccumulateGradients(GradientSet more, double grad_scale, Device& device,
                                 MemoryBudget& push_budget, StepExecutor& executor,
                                 std::optional<GradientSet>& total);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_ACCUMULATE_H_
