#ifndef MODELSTATE_SERVER_OPTIM_CUDA_STEP_EXECUTOR_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_STEP_EXECUTOR_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/compute_pool.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_stream.h"
#include "server/optim/cuda/step_lists.h"
#include "server/optim/step_executor.h"
#include "server/optim/step_plan.h"

namespace modelstate {

// Runs step plans whose pointers are memory of one GPU, on one stream. Holds the memory of the
// lists, and uses it again. Not thread-safe.
//
// Same bits as the CPU's step. Pointers are multiples of their elements' size, as pools give them;
// multiples of 16 are faster.
class CudaStepExecutor {
 public:
  // `stream` is borrowed.
  static absl::StatusOr<CudaStepExecutor> Create(const CudaStream& stream);
  CudaStepExecutor(CudaStepExecutor&&) = default;
  CudaStepExecutor& operator=(CudaStepExecutor&&) = delete;
  ~CudaStepExecutor();  // waits for what it has enqueued

  // Flattens a plan with its slots (AllocateSlots), on all threads, and enqueues the lists' copy to
  // the device.
  // Waits for the former step of this executor. The plan is not needed any longer; what it points
  // to is until the stream has come past Update. Everything that can fail for want of memory is
  // here. RESOURCE_EXHAUSTED DEVICE_MEMORY.
  absl::Status Prepare(const StepPlan& plan, ComputePool& compute);

  // By index of StepPlan::tensors. Waits for the stream. Reads the gradients only.
  absl::StatusOr<std::vector<TensorNorm>> ComputeNorms();

  // Enqueues the update of parameters and slots, and returns at once: they are complete when the
  // stream has come past it. `clip_coef` is the plan's, known only after the norm.
  absl::Status Update(double clip_coef);

  // The same for sums of accumulated gradients: Prepare, then Accumulate, which enqueues.
  absl::Status Prepare(absl::Span<const StepExecutor::Addition> additions);
  absl::Status Accumulate();

 private:
  // Where the lists of one half are in both memories.
  struct Places {
    uint64_t tensors = 0, parts = 0, scalars = 0, blocks = 0, norms = 0;
  };

  CudaStepExecutor(const CudaStream& stream, CudaEvent event)
      : stream_(&stream), done_(std::move(event)) {}

  // Waits for all that was enqueued.
  absl::Status Finish() const;
  // After the last of what a function enqueues.
  absl::Status RecordEnd();

  // Reserves `bytes` of both memories; returns where.
  uint64_t Place(uint64_t bytes);
  template <typename T>
  T* OnHost(uint64_t place) const {
    return reinterpret_cast<T*>(host_.data() + place);
  }
  template <typename T>
  T* OnDevice(uint64_t place) const {
    return reinterpret_cast<T*>(device_.data() + place);
  }
  // Makes both memories hold all that is placed.
  absl::Status Reserve();
  // Enqueues the copy of the first `bytes`, whose list is placed (PlaceCopies).
  absl::Status CopyToDevice(uint64_t bytes);
  void PlaceCopies(uint64_t bytes);

  template <typename T>
  void PlaceLists(const StepPlan& plan, const CudaStepLayout::Half& half, Places* places);
  template <typename T>
  absl::Status FillLists(const StepPlan& plan, const CudaStepLayout::Half& half,
                         const Places& places, ComputePool& compute);
  template <typename T>
  cudaError_t LaunchNorms(const CudaStepLayout::Half& half, const Places& places);
  template <typename T>
  cudaError_t LaunchUpdates(const CudaStepLayout::Half& half, const Places& places,
                            double clip_coef);

  const CudaStream* stream_;
  CudaEvent done_;        // after the last use of both memories
  bool recorded_ = true;  // false: something was enqueued that `done_` does not cover
  PinnedMemory host_;
  CudaMemory device_;
  uint64_t end_ = 0;  // of what is placed
  uint64_t copies_ = 0, joins_ = 0, norms_ = 0, scratch_ = 0, results_ = 0;
  Algorithm algorithm_ = Algorithm::kUnknown;
  double clip_value_ = 0;
  size_t tensor_count_ = 0;
  CudaStepLayout layout_;
  Places narrow_, wide_;
  CudaAccumulateWork<float> narrow_sums_{};
  CudaAccumulateWork<double> wide_sums_{};
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_STEP_EXECUTOR_H_
