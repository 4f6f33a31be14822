#include "server/optim/cuda/update.cuh"
#include "server/rules/adagrad.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Adagrad);

}  // namespace modelstate
