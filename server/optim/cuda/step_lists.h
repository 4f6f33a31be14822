#ifndef MODELSTATE_SERVER_OPTIM_CUDA_STEP_LISTS_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_STEP_LISTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/device/compute_pool.h"
#include "server/optim/cuda/kernels.h"
#include "server/optim/cuda/work.h"
#include "server/optim/step_plan.h"

namespace modelstate {

// How a plan's tensors are spread over the kernels' lists: those that are F64 are computed in
// double, all others in float.
struct CudaStepLayout {
  // The blocks of the tensors that one kernel updates.
  struct Launch {
    CudaVariant variant;
    uint64_t first_block = 0;
    uint64_t block_count = 0;
  };
  struct Half {
    uint32_t tensors = 0;
    uint64_t blocks = 0;
    std::vector<Launch> launches;
  };
  Half narrow, wide;
  // By index in the plan: the tensor's place in its half, and its first block among the half's.
  std::vector<uint32_t> place;
  std::vector<uint64_t> first_block;
};
CudaStepLayout MakeCudaStepLayout(const StepPlan& plan, ComputePool& compute);

// The memory of a half's lists: as many tensors and blocks as it has, and as many parts and scalars
// as the plan.
template <typename T>
struct CudaStepLists {
  CudaTensor<T>* tensors = nullptr;
  CudaPart<T>* parts = nullptr;
  T* scalars = nullptr;
  CudaBlock* blocks = nullptr;
};

// Writes them, on all threads. INTERNAL for what no plan holds.
template <typename T>
absl::Status FillCudaStepLists(const StepPlan& plan, const CudaStepLayout& layout,
                               ComputePool& compute, const CudaStepLists<T>& lists);

// INTERNAL where the part is of no type that gradients have, or not at a multiple of its size.
template <typename T>
absl::StatusOr<CudaPart<T>> MakeCudaPart(const GradientPart& part);

inline uint64_t CudaBlockCount(uint64_t elements) {
  return (elements + kCudaBlockElements - 1) / kCudaBlockElements;
}

// Whether a pointer is a multiple of 16; null is.
inline bool AllowsVectors(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_STEP_LISTS_H_
