// What only the fake runtime can show: late work, and failures of each call in turn.
#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <vector>

#include "common/base/status.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/optim/cuda/step_executor.h"
#include "tests/fake_cuda/fake_cuda.h"
#include "tests/server/optim/cuda/step_case.h"

namespace modelstate {
namespace {

class FakeCudaTest : public ::testing::Test {
 protected:
  ~FakeCudaTest() override { FakeCudaFail(0, cudaSuccess, false); }
};

// A step of two parameters, one of them with a master.
StepCase SmallCase() {
  StepOptions options;
  options.hyperparameters = {GetRule(Algorithm::kAdamW).defaults()};
  return StepCase(Algorithm::kAdamW, options,
                  {{DType::kF32, 5000, {DType::kF32}, true, false, false, 0},
                   {DType::kBF16, 300, {DType::kBF16}, true, true, true, 0}});
}

absl::Status Step(CudaStepExecutor& executor, const StepPlan& plan, ComputePool& compute,
                  bool* updating) {
  MS_RETURN_IF_ERROR(executor.Prepare(plan, compute));
  MS_RETURN_IF_ERROR(executor.ComputeNorms().status());
  *updating = true;
  return executor.Update(0.5);
}

TEST_F(FakeCudaTest, AFailureBeforeTheUpdateChangesNothing) {
  ComputePool compute(1);
  const absl::StatusOr<CudaStream> stream = CudaStream::Create(0);
  ASSERT_TRUE(stream.ok());
  StepCase step_case = SmallCase();
  ASSERT_TRUE(step_case.Begin(1).ok());
  step_case.FillGradients(2, 0, 1);
  TwoArenas& arenas = step_case.arenas();
  uint64_t call = 1;
  for (bool failed = true; failed; ++call) {
    SCOPED_TRACE(::testing::Message() << "call " << call);
    ASSERT_TRUE(arenas.Upload(*stream).ok());
    const StepPlan plan = step_case.Plan(arenas.device(), 0, 1, 0);
    bool updating = false;
    {
      absl::StatusOr<CudaStepExecutor> executor = CudaStepExecutor::Create(*stream);
      ASSERT_TRUE(executor.ok());
      FakeCudaFail(call, cudaErrorMemoryAllocation, false);
      const absl::Status status = Step(*executor, plan, compute, &updating);
      failed = !status.ok();
      FakeCudaFail(0, cudaSuccess, false);
      if (failed) {
        EXPECT_EQ(GetReason(status), Reason::kDeviceMemory) << status;
      }
    }
    if (!updating) {
      EXPECT_EQ(arenas.Compare(*stream), "");
    }
  }
  EXPECT_GT(call, 10u);
  // The last one went through.
  StepPlan here = step_case.Plan(arenas.host(), 0, 1, 0);
  here.clip_coef = 0.5;
  StepCase::Update(here);
  EXPECT_EQ(arenas.Compare(*stream), "");
}

using FakeCudaDeathTest = FakeCudaTest;

TEST_F(FakeCudaDeathTest, TheFakeIsHostile) {
  const absl::StatusOr<CudaStream> stream = CudaStream::Create(0);
  const absl::StatusOr<CudaMemory> memory = CudaMemory::Allocate(0, 64);
  ASSERT_TRUE(stream.ok() && memory.ok());
  EXPECT_DEATH(memory->data()[0] = 1, "");
  EXPECT_DEATH(
      {
        PinnedMemory pinned = *PinnedMemory::Allocate(64);
        for (int i = 0; i < 50; ++i) {
          (void)cudaMemcpyAsync(memory->data(), pinned.data(), 64, cudaMemcpyHostToDevice,
                                stream->handle());
        }
        pinned = PinnedMemory();
        PinnedMemory other = std::move(pinned);
      },
      "");
  EXPECT_DEATH((void)cudaMemsetAsync(memory->data(), 0, 64, nullptr), "default stream");
}

}  // namespace
}  // namespace modelstate
