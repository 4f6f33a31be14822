#include "server/optim/step_executor.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "common/base/status.h"
#include "server/optim/block_kernels.h"
#include "server/optim/device_steps.h"
#include "server/optim/step_plan.h"
#include "server/optim/tree_sum.h"

namespace modelstate {
namespace {

constexpr uint64_t kElementsPerItem = 16 * kBlockElements;

class HostStepExecutor : public StepExecutor {
 public:
  HostStepExecutor(ComputePool& compute, InstructionSet set)
      : compute_(compute), kernels_(GetBlockKernels(set)) {}

  absl::Status Prepare(StepPlan& plan) override {
    plan_ = &plan;
    work_.emplace(plan, compute_);
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<TensorNorm>> ComputeNorms() override {
    const StepPlan& plan = *plan_;
    std::vector<size_t> first_block(plan.tensors.size() + 1, 0);
    for (size_t t = 0; t < plan.tensors.size(); ++t) {
      const TensorStep& tensor = plan.tensors[t];
      first_block[t + 1] =
          first_block[t] +
          (tensor.norm != nullptr ? 0 : (tensor.elements + kBlockElements - 1) / kBlockElements);
    }
    std::vector<double> sums(first_block.back());
    std::vector<uint8_t> finite(first_block.back());
    work_->ForEachItem(compute_, [&](const WorkItem& item) {
      const TensorStep& tensor = plan.tensors[item.tensor];
      if (tensor.norm != nullptr) return;
      for (uint64_t begin = item.begin; begin < item.end; begin += kBlockElements) {
        const BlockNorm norm =
            kernels_.norm(plan, tensor, begin, std::min(item.end, begin + kBlockElements));
        const size_t block = first_block[item.tensor] + begin / kBlockElements;
        sums[block] = norm.sum_of_squares;
        finite[block] = norm.finite;
      }
    });
    std::vector<TensorNorm> norms(plan.tensors.size());
    for (size_t t = 0; t < plan.tensors.size(); ++t) {
      if (plan.tensors[t].norm != nullptr) continue;
      const size_t begin = first_block[t];
      const size_t count = first_block[t + 1] - begin;
      norms[t].finite = std::count(finite.begin() + static_cast<int64_t>(begin),
                                   finite.begin() + static_cast<int64_t>(begin + count), 0) == 0;
      norms[t].sum_of_squares = TreeSum(absl::MakeSpan(sums).subspan(begin, count));
    }
    return norms;
  }

  absl::Status Update(double clip_coef,
                      absl::FunctionRef<void(const TensorStep&)> updated) override {
    plan_->clip_coef = clip_coef;
    work_->ForEachItem(compute_, [&](const WorkItem& item) {
      const TensorStep& tensor = plan_->tensors[item.tensor];
      kernels_.update(*plan_, tensor, item.begin, item.end);
      if (item.begin == 0) updated(tensor);
    });
    return absl::OkStatus();
  }

  absl::Status Accumulate(absl::Span<const Addition> additions) override {
    struct Piece {
      const Addition* addition;
      uint64_t begin;
    };
    std::vector<Piece> pieces;
    for (const Addition& addition : additions) {
      for (uint64_t begin = 0; begin < addition.elements; begin += kElementsPerItem) {
        pieces.push_back({&addition, begin});
      }
    }
    compute_.ParallelFor(pieces.size(), [&](size_t i) {
      const auto& [addition, begin] = pieces[i];
      kernels_.accumulate(addition->from, addition->to, addition->wide, addition->add, begin,
                          std::min(addition->elements, begin + kElementsPerItem));
    });
    return absl::OkStatus();
  }

 private:
  ComputePool& compute_;
  const BlockKernels& kernels_;
  StepPlan* plan_ = nullptr;
  std::optional<WorkList> work_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StepExecutor>> MakeStepExecutor(Device& device, ComputePool& compute,
                                                               InstructionSet set) {
  if (!device.host_visible()) return MakeGpuStepExecutor(device, compute);
  return std::make_unique<HostStepExecutor>(compute, set);
}

absl::StatusOr<StepExecutor*> DeviceStepExecutor::Get(Device& device, ComputePool& compute) {
  if (device_ != &device) {
    MS_ASSIGN_OR_RETURN(executor_, MakeStepExecutor(device, compute));
    device_ = &device;
  }
  return executor_.get();
}

}  // namespace modelstate
