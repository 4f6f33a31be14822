#include "server/optim/cuda/update.cuh"
#include "server/rules/adamax.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Adamax);

}  // namespace modelstate
