#include "server/optim/device_steps.h"

#include <utility>

#include "common/base/status.h"
#include "server/device/cuda/cuda_device.h"
#include "server/optim/cuda/step_executor.h"

namespace modelstate {
namespace {

// On a stream of its own, so that steps of several modules and transfers run beside each other.
class GpuStepExecutor : public StepExecutor {
 public:
  GpuStepExecutor(CudaDevice& device, ComputePool& compute, std::unique_ptr<CudaStream> stream,
                  CudaStepExecutor executor)
      : device_(device),
        compute_(compute),
        stream_(std::move(stream)),
        executor_(std::move(executor)) {}

  absl::Status Prepare(StepPlan& plan) override {
    plan_ = &plan;
    return Settle(executor_.Prepare(plan, compute_));
  }

  absl::StatusOr<std::vector<TensorNorm>> ComputeNorms() override {
    absl::StatusOr<std::vector<TensorNorm>> norms = executor_.ComputeNorms();
    if (!norms.ok()) return Settle(norms.status());
    return norms;
  }

  absl::Status Update(double clip_coef,
                      absl::FunctionRef<void(const TensorStep&)> updated) override {
    absl::Status status = executor_.Update(clip_coef);
    if (status.ok()) status = stream_->Synchronize();
    if (!status.ok()) return Broken(status);
    ForEachPiece(plan_->tensors.size(), compute_, [&](size_t begin, size_t end) {
      for (size_t t = begin; t < end; ++t) updated(plan_->tensors[t]);
    });
    return absl::OkStatus();
  }

  absl::Status Accumulate(absl::Span<const Addition> additions) override {
    MS_RETURN_IF_ERROR(Settle(executor_.Prepare(additions)));
    absl::Status status = executor_.Accumulate();
    if (status.ok()) status = stream_->Synchronize();
    return status.ok() ? status : Broken(status);
  }

 private:
  // After an error nothing may still use memory whose owners may free it.
  absl::Status Settle(absl::Status status) {
    if (!status.ok()) (void)stream_->Synchronize();
    return device_.Note(std::move(status));
  }
  // Some elements were written, others not.
  absl::Status Broken(const absl::Status& status) {
    return Settle(absl::InternalError(status.message()));
  }

  CudaDevice& device_;
  ComputePool& compute_;
  const std::unique_ptr<CudaStream> stream_;  // where the executor can point to it
  CudaStepExecutor executor_;
  StepPlan* plan_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StepExecutor>> MakeGpuStepExecutor(Device& device,
                                                                  ComputePool& compute) {
  auto& gpu = static_cast<CudaDevice&>(device);  // the only kind whose memory is not the host's
  absl::StatusOr<CudaStream> made = CudaStream::CreateUrgent(gpu.index());
  if (!made.ok()) return device.Note(made.status());
  auto stream = std::make_unique<CudaStream>(*std::move(made));
  absl::StatusOr<CudaStepExecutor> executor = CudaStepExecutor::Create(*stream);
  if (!executor.ok()) return device.Note(executor.status());
  return std::make_unique<GpuStepExecutor>(gpu, compute, std::move(stream), *std::move(executor));
}

}  // namespace modelstate
