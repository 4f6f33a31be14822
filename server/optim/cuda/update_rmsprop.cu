#include "server/optim/cuda/update.cuh"
#include "server/rules/rmsprop.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Rmsprop);

}  // namespace modelstate
