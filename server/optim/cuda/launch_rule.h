#ifndef MODELSTATE_SERVER_OPTIM_CUDA_LAUNCH_RULE_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_LAUNCH_RULE_H_

#include "server/optim/cuda/kernels.h"

namespace modelstate {

// LaunchUpdate() of one rule; defined in the rule's own file, update_RULE.cu.
template <typename Rule, typename T>
cudaError_t LaunchRule(CudaVariant variant, const CudaUpdateWork<T>& work, cudaStream_t stream);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_LAUNCH_RULE_H_
