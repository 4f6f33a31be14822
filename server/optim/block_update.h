#ifndef MODELSTATE_SERVER_OPTIM_BLOCK_UPDATE_H_
#define MODELSTATE_SERVER_OPTIM_BLOCK_UPDATE_H_

#include <cstdint>

#include "server/optim/step_plan.h"

namespace modelstate {

// What one block of gradients contributes to the norm.
struct BlockNorm {
  double sum_of_squares = 0;
  bool finite = true;
};

// Over the gradient's elements [begin, end) divided by `grad_scale`, at most kBlockElements of
// them: squares in double, in lanes that are joined in a fixed tree. Reads only.
BlockNorm ComputeBlockNorm(const TensorStep& tensor, uint64_t begin, uint64_t end,
                           double grad_scale);

// Updates the elements [begin, end) of parameter and slots; cannot fail. `begin` is a multiple of
// kBlockElements.
void UpdateBlocks(Algorithm algorithm, const TensorStep& tensor, const Hyperparameters& h,
                  double grad_scale, double clip_coef, uint64_t begin, uint64_t end);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_BLOCK_UPDATE_H_
