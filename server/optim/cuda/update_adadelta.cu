#include "server/optim/cuda/update.cuh"
#include "server/rules/adadelta.h"

namespace modelstate {

MODELSTATE_CUDA_RULE(Adadelta);

}  // namespace modelstate
