#include "server/optim/cuda/update.cuh"
#include "server/rules/sgd.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Sgd);

}  // namespace modelstate
