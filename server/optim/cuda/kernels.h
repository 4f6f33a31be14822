#ifndef MODELSTATE_SERVER_OPTIM_CUDA_KERNELS_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <compare>

#include "server/optim/cuda/work.h"

namespace modelstate {

// BlockKernels for a GPU: one launch for all tensors of a step that one variant of a rule updates
// (two where some of them are not plain), never one for each. Same bits as the CPU's; only a NaN
// may have another sign or payload.
//
// Each enqueues on `stream` and returns at once, with the launch's own error; what goes wrong while
// a kernel runs shows at a later call. The lists and all that they point to are memory of the
// current device, which is the stream's, and stay as they are until the stream has come past the
// launch. A list without blocks launches nothing.

// Of each block the squares in double, in the CPU's 64 lanes and their tree. Reads only.
cudaError_t LaunchNorm(const CudaNormWork<float>& work, cudaStream_t stream);
cudaError_t LaunchNorm(const CudaNormWork<double>& work, cudaStream_t stream);

// Of each join the sum of its norms in the tree of TreeSum, and whether all are finite. A join of
// none is 0 and finite.
cudaError_t LaunchJoin(const CudaJoinWork& work, cudaStream_t stream);

// Which of a rule's kernels updates a tensor.
struct CudaVariant {
  int variant = 0;     // Rule::Variant()
  bool plain = false;  // CudaTensor::plain

  friend auto operator<=>(const CudaVariant&, const CudaVariant&) = default;
};

// REQUIRES: every tensor of `work` is of `variant`, and has the slots that it uses.
cudaError_t LaunchUpdate(Algorithm algorithm, CudaVariant variant,
                         const CudaUpdateWork<float>& work, cudaStream_t stream);
cudaError_t LaunchUpdate(Algorithm algorithm, CudaVariant variant,
                         const CudaUpdateWork<double>& work, cudaStream_t stream);

cudaError_t LaunchAccumulate(const CudaAccumulateWork<float>& work, cudaStream_t stream);
cudaError_t LaunchAccumulate(const CudaAccumulateWork<double>& work, cudaStream_t stream);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_KERNELS_H_
