#include "server/optim/cuda/update.cuh"
#include "server/rules/adam.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Adam);

}  // namespace modelstate
