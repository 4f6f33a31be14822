#include "server/optim/cuda/update.cuh"
#include "server/rules/nadam.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(NAdam);

}  // namespace modelstate
