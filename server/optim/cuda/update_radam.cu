#include "server/optim/cuda/update.cuh"
#include "server/rules/radam.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(RAdam);

}  // namespace modelstate
