#ifndef MODELSTATE_SERVER_OPTIM_CUDA_LAUNCH_RULE_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_LAUNCH_RULE_H_

#include <cuda_runtime_api.h>

#include "server/optim/cuda/work.h"

namespace modelstate {

// LaunchUpdate() of one rule; defined in the rule's own file, update_RULE.cu.
template <typename Rule, typename T>
cudaError_t LaunchRule(int variant, const CudaUpdateWork<T>& work, cudaStream_t stream);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_LAUNCH_RULE_H_
