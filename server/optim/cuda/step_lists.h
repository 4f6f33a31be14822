#ifndef MODELSTATE_SERVER_OPTIM_CUDA_STEP_LISTS_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_STEP_LISTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "server/optim/cuda/work.h"
#include "server/optim/step_plan.h"

namespace modelstate {

// What of a plan is computed in T, as the kernels read it.
template <typename T>
struct CudaStepLists {
  // The blocks of the tensors that one variant of the rule updates.
  struct Launch {
    int variant = 0;
    uint64_t first_block = 0;
    uint64_t block_count = 0;
  };
  std::vector<CudaTensor<T>> tensors;
  std::vector<CudaPart<T>> parts;
  std::vector<T> scalars;
  std::vector<CudaBlock> blocks;
  std::vector<Launch> launches;
  std::vector<uint32_t> index;        // of each tensor, in the plan
  std::vector<uint64_t> first_block;  // of each tensor
};

// Of the plan's tensors those that are F64 for double, all others for float. INTERNAL for what no
// plan holds.
template <typename T>
absl::StatusOr<CudaStepLists<T>> MakeCudaStepLists(const StepPlan& plan);

// INTERNAL where the part is of no type that gradients have, or not at a multiple of its size.
template <typename T>
absl::StatusOr<CudaPart<T>> MakeCudaPart(const GradientPart& part);

// The blocks of a tensor, appended.
void AppendCudaBlocks(uint32_t tensor, uint64_t elements, std::vector<CudaBlock>* blocks);

// Whether a pointer is a multiple of 16; null is.
bool AllowsVectors(const void* pointer);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_STEP_LISTS_H_
