#include "server/optim/cuda/step_executor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "server/rules/rules.h"
#include "tests/server/optim/cuda/step_case.h"

namespace modelstate {
namespace {

constexpr DType kParameterDTypes[] = {DType::kF32, DType::kF64,    DType::kBF16,
                                      DType::kF16, DType::kF8E4M3, DType::kF8E5M2};

class CudaStepTest : public ::testing::TestWithParam<Algorithm> {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "no CUDA device";
    absl::StatusOr<CudaStream> stream = CudaStream::Create(0);
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_.emplace(*std::move(stream));
    absl::StatusOr<CudaStepExecutor> executor = CudaStepExecutor::Create(*stream_);
    ASSERT_TRUE(executor.ok()) << executor.status();
    executor_.emplace(*std::move(executor));
  }

  // One step on both, from the same memory. `max_norm`: 0 is no limit.
  void Step(StepCase& step_case, uint64_t step, double inverse_scale, double clip_value,
            double max_norm) {
    TwoArenas& arenas = step_case.arenas();
    ASSERT_TRUE(arenas.Upload(*stream_).ok());
    StepPlan here = step_case.Plan(arenas.host(), step, inverse_scale, clip_value);
    const StepPlan there = step_case.Plan(arenas.device(), step, inverse_scale, clip_value);
    std::vector<uint32_t> nonfinite;
    const double norm = StepCase::Norm(here, &nonfinite);
    here.clip_coef = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1;
    StepCase::Update(here);

    absl::Status status = executor_->Prepare(there, compute_);
    ASSERT_TRUE(status.ok()) << status;
    const absl::StatusOr<std::vector<TensorNorm>> norms = executor_->ComputeNorms();
    ASSERT_TRUE(norms.ok()) << norms.status();
    std::vector<uint32_t> cuda_nonfinite;
    const double cuda_norm = StepCase::Join(*norms, &cuda_nonfinite);
    EXPECT_TRUE(norm == cuda_norm || (std::isnan(norm) && std::isnan(cuda_norm)))
        << norm << " on the CPU, " << cuda_norm << " on the GPU";
    EXPECT_EQ(nonfinite, cuda_nonfinite);
    status = executor_->Update(here.clip_coef);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_EQ(arenas.Compare(*stream_), "");
  }

  ComputePool compute_{2};
  std::optional<CudaStream> stream_;
  std::optional<CudaStepExecutor> executor_;
};

// Every dtype with every gradient it can have, in place and not, with and without a master, over
// shapes around the blocks' edges.
std::vector<TensorCase> AllTensors() {
  std::vector<TensorCase> tensors;
  size_t shape = 0;
  static constexpr uint64_t kElements[] = {1, 3, 4095, 4096, 4097, 63, 64, 0, 130, 8195, 20001};
  const auto add = [&](TensorCase tensor) {
    for (const uint64_t shift : {0, 1, 3}) {
      tensor.elements = kElements[shape++ % std::size(kElements)];
      tensor.shift = shift;
      tensor.moves = !tensor.moves;
      tensors.push_back(tensor);
    }
  };
  for (const DType dtype : kParameterDTypes) {
    std::vector<std::vector<DType>> gradients = {{DType::kF32},
                                                 {DType::kBF16},
                                                 {DType::kF16},
                                                 {dtype},
                                                 {DType::kF32, DType::kBF16},
                                                 {DType::kF16, DType::kF32, DType::kF32}};
    if (dtype == DType::kF64) gradients.push_back({DType::kF64, DType::kF16});
    for (const std::vector<DType>& parts : gradients) {
      for (const bool master : {false, true}) {
        if (master && StepCase::Computed(dtype) == dtype) continue;
        for (const bool over_gradient : {false, true}) {
          if (over_gradient && DTypeSize(parts[0]) != DTypeSize(dtype)) continue;
          add({dtype, 0, parts, over_gradient, master, false, 0});
        }
      }
    }
  }
  // Large, as most parameters are.
  tensors.push_back({DType::kF32, 300007, {DType::kF32}, true, false, false, 0});
  tensors.push_back({DType::kBF16, 300007, {DType::kBF16}, true, true, false, 0});
  return tensors;
}

// All that hyper-parameters can switch on and off.
std::vector<Hyperparameters> Variations(Algorithm algorithm) {
  const RuleInfo& rule = GetRule(algorithm);
  std::vector<Hyperparameters> variations = {rule.defaults()};
  const auto vary = [&](auto field, auto first, auto second) {
    if (!(rule.defaults().*field).has_value()) return;
    std::vector<Hyperparameters> next;
    for (Hyperparameters h : variations) {
      for (const auto value : {first, second}) {
        h.*field = value;
        if (rule.check(h) == nullptr) next.push_back(h);
      }
    }
    variations = std::move(next);
  };
  vary(&Hyperparameters::weight_decay, 0.0, 0.01);
  vary(&Hyperparameters::momentum, 0.0, 0.9);
  vary(&Hyperparameters::nesterov, false, true);
  vary(&Hyperparameters::amsgrad, false, true);
  vary(&Hyperparameters::centered, false, true);
  vary(&Hyperparameters::decoupled_weight_decay, false, true);
  vary(&Hyperparameters::maximize, false, true);
  return variations;
}

// The variants of the rule's kernels that some hyper-parameters lead to.
std::set<int> VariantsOf(Algorithm algorithm, const std::vector<Hyperparameters>& all) {
  std::set<int> variants;
  AllRules::Visit(algorithm, [&](auto rule) {
    for (const Hyperparameters& h : all) {
      for (const bool begins : {false, true}) variants.insert(decltype(rule)::Variant(h, begins));
    }
  });
  return variants;
}

TEST_P(CudaStepTest, EveryVariantAndDTypeHasTheCpusBits) {
  const std::vector<Hyperparameters> variations = Variations(GetParam());
  RecordProperty("variants", static_cast<int>(VariantsOf(GetParam(), variations).size()));
  uint64_t seed = 1;
  for (const Hyperparameters& h : variations) {
    StepOptions options;
    options.hyperparameters = {h, GetRule(GetParam()).defaults()};
    StepCase step_case(GetParam(), options, AllTensors());
    ASSERT_TRUE(step_case.Begin(++seed).ok());
    for (uint64_t step = 0; step < 3; ++step) {
      SCOPED_TRACE(absl::StrCat("step ", step, ", seed ", seed));
      // Unscaled, clipped by norm, clipped by value, both: not the same at every variation.
      const uint64_t way = seed + step;
      const double scale = way % 2 == 0 ? 1 : 1024;
      step_case.FillGradients(seed * 100 + step, step, scale);
      Step(step_case, step, 1 / scale, way % 3 == 0 ? 0.05 : 0, way % 4 < 2 ? 1.5 : 0);
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rules, CudaStepTest, ::testing::ValuesIn(AllAlgorithms()),
                         [](const auto& info) { return AlgorithmName(info.param); });

using CudaLargeTest = CudaStepTest;

// The rule is elementwise: what is far back is compared with a short tensor of the same elements.
TEST_P(CudaLargeTest, ElementsBeyond32BitsAreTheirOwn) {
  constexpr uint64_t kFar = (uint64_t{1} << 32) - 4096;
  constexpr uint64_t kTail = 3 * 4096 + 5;
  StepOptions options;
  options.hyperparameters = {GetRule(Algorithm::kSgd).defaults()};
  options.hyperparameters[0].lr = 0.5;
  const auto plan = [&](uint8_t* parameter, uint8_t* gradient, uint64_t elements) {
    StepPlan plan;
    plan.algorithm = Algorithm::kSgd;
    plan.options = &options;
    plan.scalars = {GetRule(Algorithm::kSgd).make_scalars(options.hyperparameters[0], 1, 1)};
    plan.parts = {{gradient, DType::kF8E5M2, 1, 1}};
    plan.tensor_memory = std::make_unique<TensorStep[]>(1);
    plan.tensors = absl::MakeSpan(plan.tensor_memory.get(), 1);
    plan.tensors[0].dtype = DType::kF8E5M2;
    plan.tensors[0].elements = elements;
    plan.tensors[0].parameter = parameter;
    plan.tensors[0].output = gradient;
    plan.tensors[0].part_count = 1;
    return plan;
  };
  std::vector<uint8_t> parameter(kTail), gradient(kTail);
  Numbers numbers(3);
  numbers.Fill(DType::kF8E5M2, kTail, 1, parameter.data());
  numbers.Fill(DType::kF8E5M2, kTail, 1, gradient.data());

  absl::StatusOr<CudaMemory> parameters = CudaMemory::Allocate(0, kFar + kTail);
  absl::StatusOr<CudaMemory> gradients = CudaMemory::Allocate(0, kFar + kTail);
  if (!parameters.ok() || !gradients.ok()) GTEST_SKIP() << "too little memory";
  const auto copy = [&](uint8_t* to, const uint8_t* from, cudaMemcpyKind kind) {
    ASSERT_EQ(cudaMemcpyAsync(to, from, kTail, kind, stream_->handle()), cudaSuccess);
  };
  for (const CudaMemory* memory : {&*parameters, &*gradients}) {
    ASSERT_EQ(cudaMemsetAsync(memory->data(), 0, kFar, stream_->handle()), cudaSuccess);
  }
  copy(parameters->data() + kFar, parameter.data(), cudaMemcpyHostToDevice);
  copy(gradients->data() + kFar, gradient.data(), cudaMemcpyHostToDevice);
  const StepPlan there = plan(parameters->data(), gradients->data(), kFar + kTail);
  const StepPlan here = plan(parameter.data(), gradient.data(), kTail);
  std::vector<uint32_t> nonfinite;
  const double norm = StepCase::Norm(here, &nonfinite);
  ASSERT_TRUE(executor_->Prepare(there, compute_).ok());
  const absl::StatusOr<std::vector<TensorNorm>> norms = executor_->ComputeNorms();
  ASSERT_TRUE(norms.ok()) << norms.status();
  // Another tree, of zeros too.
  EXPECT_NEAR(StepCase::Join(*norms, &nonfinite), norm, norm * 1e-12);
  ASSERT_TRUE(executor_->Update(1).ok());
  StepCase::Update(here);
  std::vector<uint8_t> got(kTail), front(kTail);
  copy(got.data(), gradients->data() + kFar, cudaMemcpyDeviceToHost);
  copy(front.data(), gradients->data(), cudaMemcpyDeviceToHost);
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_TRUE(got == gradient);
  EXPECT_EQ(front, std::vector<uint8_t>(kTail, 0));
}

INSTANTIATE_TEST_SUITE_P(Sgd, CudaLargeTest, ::testing::Values(Algorithm::kSgd),
                         [](const auto& info) { return AlgorithmName(info.param); });

using CudaNormTest = CudaStepTest;

StepCase NormCase() {
  StepOptions options;
  options.hyperparameters = {GetRule(Algorithm::kSgd).defaults()};
  std::vector<TensorCase> tensors;
  for (const DType dtype : {DType::kF32, DType::kF64, DType::kBF16}) {
    for (const uint64_t elements : {1, 4096, 12289, 1 << 20}) {
      tensors.push_back({dtype, elements, {dtype}, true, false, false, 0});
      tensors.push_back({dtype, elements, {DType::kF32, DType::kF16}, false, false, false, 1});
    }
  }
  return StepCase(Algorithm::kSgd, options, tensors);
}

TEST_P(CudaNormTest, ElementsThatAreNotFiniteAreFoundWhereTheyAre) {
  StepCase step_case = NormCase();
  ASSERT_TRUE(step_case.Begin(1).ok());
  step_case.FillGradients(2, 0, 1);
  step_case.SetGradient(2, 0, 4095, 0, std::numeric_limits<double>::infinity());
  step_case.SetGradient(5, 1, 12288, 0, std::numeric_limits<double>::quiet_NaN());
  step_case.SetGradient(8, 0, 0, 0, 1e300);  // finite, but its square is not
  step_case.SetGradient(14, 0, 777777, 0, -std::numeric_limits<double>::infinity());
  TwoArenas& arenas = step_case.arenas();
  ASSERT_TRUE(arenas.Upload(*stream_).ok());
  std::vector<uint32_t> nonfinite;
  StepCase::Norm(step_case.Plan(arenas.host(), 0, 1, 0), &nonfinite);
  EXPECT_EQ(nonfinite, (std::vector<uint32_t>{2, 5, 14}));
  ASSERT_TRUE(executor_->Prepare(step_case.Plan(arenas.device(), 0, 1, 0), compute_).ok());
  const absl::StatusOr<std::vector<TensorNorm>> norms = executor_->ComputeNorms();
  ASSERT_TRUE(norms.ok()) << norms.status();
  std::vector<uint32_t> cuda_nonfinite;
  StepCase::Join(*norms, &cuda_nonfinite);
  EXPECT_EQ(cuda_nonfinite, nonfinite);
  EXPECT_EQ(arenas.Compare(*stream_), "") << "the norm wrote to tensors";
}

INSTANTIATE_TEST_SUITE_P(Sgd, CudaNormTest, ::testing::Values(Algorithm::kSgd),
                         [](const auto& info) { return AlgorithmName(info.param); });

using CudaAccumulateTest = CudaStepTest;

TEST_P(CudaAccumulateTest, SumsHaveTheCpusBits) {
  struct Sum {
    DType from;
    bool wide, add;
    uint64_t elements, from_place, to_place;
  };
  TwoArenas arenas;
  std::vector<Sum> sums;
  for (const DType dtype : kParameterDTypes) {
    for (const bool wide : {false, true}) {
      if (!wide && dtype == DType::kF64) continue;
      for (const bool add : {false, true}) {
        for (const uint64_t elements : {0, 1, 4095, 4096, 4097, 30011}) {
          const uint64_t shift = elements % 4 == 1 ? 1 : 0;
          const DType to = wide ? DType::kF64 : DType::kF32;
          const uint64_t from_place = arenas.Add(dtype, elements, shift * DTypeSize(dtype));
          // The first sum of gradients of its dtype lies where they were.
          const bool over = !add && dtype == to && elements % 2 == 0;
          sums.push_back({dtype, wide, add, elements, from_place,
                          over ? from_place : arenas.Add(to, elements, shift * DTypeSize(to))});
        }
      }
    }
  }
  ASSERT_TRUE(arenas.Allocate().ok());
  Numbers numbers(7);
  std::vector<StepExecutor::Addition> additions;
  for (const Sum& sum : sums) {
    numbers.Fill(sum.wide ? DType::kF64 : DType::kF32, sum.elements, 1,
                 arenas.host() + sum.to_place);
    numbers.Fill(sum.from, sum.elements, 1, arenas.host() + sum.from_place);
    additions.push_back({{arenas.device() + sum.from_place, sum.from, 1.0 / 3, 1},
                         arenas.device() + sum.to_place,
                         sum.wide,
                         sum.add,
                         sum.elements});
  }
  ASSERT_TRUE(arenas.Upload(*stream_).ok());
  absl::Status status = executor_->Prepare(additions);
  ASSERT_TRUE(status.ok()) << status;
  status = executor_->Accumulate();
  ASSERT_TRUE(status.ok()) << status;
  const BlockKernels& kernels = GetBlockKernels(SupportedInstructionSets().back());
  for (const Sum& sum : sums) {
    kernels.accumulate({arenas.host() + sum.from_place, sum.from, 1.0 / 3, 1},
                       arenas.host() + sum.to_place, sum.wide, sum.add, 0, sum.elements);
  }
  EXPECT_EQ(arenas.Compare(*stream_), "");
}

INSTANTIATE_TEST_SUITE_P(Sgd, CudaAccumulateTest, ::testing::Values(Algorithm::kSgd),
                         [](const auto& info) { return AlgorithmName(info.param); });

}  // namespace
}  // namespace modelstate
