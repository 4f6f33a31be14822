#include "server/optim/cuda/update.cuh"
#include "server/rules/lion.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Lion);

}  // namespace modelstate
