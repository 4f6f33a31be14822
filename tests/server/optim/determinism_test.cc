// The same bits for any number of threads, any instruction set, and whatever arithmetic a thread
// was left in.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <random>
#include <tuple>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/tensor_cast.h"
#include "server/optim/block_kernels.h"
#include "server/rules/rule_info.h"
#include "tests/server/optim/step_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

using testing::Draw;
using testing::DrawMany;
using testing::SteppedModule;

using AllBytes = std::vector<std::vector<uint8_t>>;

AllBytes BytesOf(const SteppedModule& module) {
  AllBytes all;
  for (const StorageRef& storage : module.version.storages) {
    all.push_back(BytesOf(*storage));
  }
  for (const ParameterState& parameter : module.state.parameters) {
    for (const auto& slot : parameter.slots) {
      if (slot) all.push_back(BytesOf(*slot));
    }
  }
  return all;
}

std::vector<uint8_t> DrawAs(DType dtype, uint64_t stream, size_t count, double factor) {
  std::vector<double> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = Draw(stream, i) * factor;
  std::vector<uint8_t> bytes(count * DTypeSize(dtype));
  CastElements(DType::kF64, reinterpret_cast<const uint8_t*>(values.data()), dtype, bytes.data(),
               static_cast<int64_t>(count));
  return bytes;
}

// Everything that can switch a variant of the rule on.
Hyperparameters Everything(Algorithm algorithm) {
  Hyperparameters h;
  const RuleInfo& rule = GetRule(algorithm);
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (!rule.has(field)) continue;
    const std::string name = field.name;
    if (field.flag != nullptr) h.*field.flag = name != "decoupled_weight_decay";
    if (name == "weight_decay" || name == "lr_decay" || name == "initial_accumulator_value") {
      h.*field.number = 0.1;
    }
    if (name == "momentum") h.momentum = 0.8;
  }
  return h;
}

struct Conditions {
  size_t threads = 1;
  InstructionSet instruction_set = InstructionSet::kBaseline;
  bool backwards = false;  // the order of the push
};

// Three steps over tensors of many sizes.
AllBytes StepThrice(const OptimizerConfig& config, const Conditions& given, double* norm) {
  const std::vector<int64_t> sizes = {1, 15, 2047, 4095, 4096, 4097, 65536, 70001, 0, 3};
  const DType dtypes[] = {DType::kF32, DType::kBF16, DType::kF64, DType::kF16};
  CpuDevice device(uint64_t{1} << 30);
  SteppedModule module(device);
  module.compute = std::make_shared<ComputePool>(given.threads);
  module.instruction_set = given.instruction_set;
  std::vector<TensorSpec> specs;
  for (size_t i = 0; i < sizes.size(); ++i) {
    specs.push_back(SteppedModule::Parameter(absl::StrCat("p", i), {sizes[i]}, dtypes[i % 4]));
  }
  module.Create(specs, config);
  for (size_t i = 0; i < sizes.size(); ++i) {
    module.Set(absl::StrCat("p", i), DrawAs(dtypes[i % 4], i, static_cast<size_t>(sizes[i]), 1));
  }
  for (uint64_t step = 1; step <= 3; ++step) {
    SteppedModule::Push push;
    for (size_t i = 0; i < sizes.size(); ++i) {
      // In the second step in another dtype than the parameter's.
      const DType dtype = step == 2 ? DType::kBF16 : dtypes[i % 4];
      push.push_back({absl::StrCat("p", i),
                      DrawAs(dtype, step * 100 + i, static_cast<size_t>(sizes[i]), 3), dtype});
    }
    if (given.backwards) std::reverse(push.begin(), push.end());
    absl::StatusOr<StepResult> result = module.Step(push, 3);
    EXPECT_TRUE(result.ok()) << result.status();
    *norm = result->grad_norm;
  }
  return BytesOf(module);
}

constexpr InstructionSet kInstructionSets[] = {
    InstructionSet::kBaseline, InstructionSet::kX86_64_V3, InstructionSet::kX86_64_V4};

std::string TestName(InstructionSet set) {
  return absl::StrReplaceAll(InstructionSetName(set), {{"-", "_"}});
}

// One test for each set, so that a run on a machine that lacks one says what it did not compare.
void SkipUnlessSupported(InstructionSet set) {
  const std::vector<InstructionSet>& supported = SupportedInstructionSets();
  if (std::find(supported.begin(), supported.end(), set) == supported.end()) {
    GTEST_SKIP() << "this CPU lacks " << InstructionSetName(set);
  }
}

class EachRuleAndInstructionSet
    : public ::testing::TestWithParam<std::tuple<Algorithm, InstructionSet>> {
 protected:
  void SetUp() override { SkipUnlessSupported(std::get<1>(GetParam())); }
};

TEST_P(EachRuleAndInstructionSet, StepsHaveTheSameBitsForAnyThreads) {
  const auto [algorithm, set] = GetParam();
  for (bool everything : {false, true}) {
    OptimizerConfig config;
    config.algorithm = algorithm;
    config.max_grad_norm = 2;
    config.master_weights = everything;
    if (everything) config.hyperparameters = Everything(algorithm);
    double norm = 0;
    const AllBytes reference = StepThrice(config, Conditions(), &norm);
    for (size_t threads : {1, 2, 5}) {
      double other_norm = 0;
      EXPECT_TRUE(StepThrice(config, {threads, set, threads == 2}, &other_norm) == reference)
          << threads << " threads";
      EXPECT_EQ(other_norm, norm);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(StepDeterminism, EachRuleAndInstructionSet,
                         ::testing::Combine(::testing::ValuesIn(AllAlgorithms().begin(),
                                                                AllAlgorithms().end()),
                                            ::testing::ValuesIn(kInstructionSets)),
                         [](const auto& info) {
                           return absl::StrCat(AlgorithmName(std::get<0>(info.param)), "_",
                                               TestName(std::get<1>(info.param)));
                         });

#if defined(__x86_64__)
class EachRule : public ::testing::TestWithParam<Algorithm> {};

TEST_P(EachRule, AThreadsOwnRoundingDoesNotShow) {
  OptimizerConfig config;
  config.algorithm = GetParam();
  double norm = 0;
  const AllBytes reference = StepThrice(config, Conditions(), &norm);
  const unsigned before = _mm_getcsr();
  // Flush to zero, subnormals are zero; then toward zero.
  for (unsigned mode : {0x9FC0u, 0x7F80u}) {
    _mm_setcsr(mode);
    double other_norm = 0;
    const AllBytes bytes = StepThrice(config, Conditions(), &other_norm);
    EXPECT_EQ(_mm_getcsr() & ~0x3Fu, mode & ~0x3Fu) << "and is as it was, but for sticky flags";
    _mm_setcsr(before);
    EXPECT_TRUE(bytes == reference) << mode;
  }
}

INSTANTIATE_TEST_SUITE_P(StepDeterminism, EachRule,
                         ::testing::ValuesIn(AllAlgorithms().begin(), AllAlgorithms().end()),
                         [](const auto& info) { return AlgorithmName(info.param); });
#endif

// Three workers, each with an accumulated part, at magnitudes where every other order or rounding
// of the additions shows.
AllBytes StepRound(const Conditions& given, double* norm) {
  const std::vector<int64_t> sizes = {1, 4097, 70001, 33};
  const DType dtypes[] = {DType::kF32, DType::kBF16, DType::kF64, DType::kF16};
  CpuDevice device(uint64_t{1} << 30);
  SteppedModule module(device);
  module.compute = std::make_shared<ComputePool>(given.threads);
  module.instruction_set = given.instruction_set;
  std::vector<TensorSpec> specs;
  for (size_t i = 0; i < sizes.size(); ++i) {
    specs.push_back(SteppedModule::Parameter(absl::StrCat("p", i), {sizes[i]}, dtypes[i]));
  }
  OptimizerConfig config;
  config.algorithm = Algorithm::kAdamW;
  config.max_grad_norm = 2;
  module.Create(specs, config);
  std::vector<Contribution> contributions(3);
  const double weights[] = {1, 3, 0.7};
  for (size_t worker = 0; worker < 3; ++worker) {
    contributions[worker].weight = weights[worker];
    for (size_t part = 0; part < 2; ++part) {
      SteppedModule::Push push;
      for (size_t i = 0; i < sizes.size(); ++i) {
        const DType dtype = part == 0 ? DType::kBF16 : DType::kF32;
        push.push_back({absl::StrCat("p", i),
                        DrawAs(dtype, worker * 100 + part * 10 + i, static_cast<size_t>(sizes[i]),
                               std::pow(30.0, static_cast<double>(worker))),
                        dtype});
      }
      contributions[worker].parts.push_back({*module.Stage(push), part == 0 ? 3.0 : 1.0});
    }
  }
  const absl::StatusOr<StepResult> result = module.StepWith(contributions);
  EXPECT_TRUE(result.ok()) << result.status();
  *norm = result->grad_norm;
  return BytesOf(module);
}

class EachInstructionSet : public ::testing::TestWithParam<InstructionSet> {
 protected:
  void SetUp() override { SkipUnlessSupported(GetParam()); }
};

TEST_P(EachInstructionSet, ARoundHasTheSameBitsForAnyThreads) {
  double norm = 0;
  const AllBytes reference = StepRound(Conditions(), &norm);
  EXPECT_GT(norm, 0);
  for (size_t threads : {1, 2, 5}) {
    double other_norm = 0;
    EXPECT_TRUE(StepRound({threads, GetParam()}, &other_norm) == reference)
        << threads << " threads";
    EXPECT_EQ(other_norm, norm);
  }
}

TEST_P(EachInstructionSet, WhatIsAccumulatedHasTheSameBits) {
  constexpr size_t kCount = 5001;  // chunks, and a rest
  const std::vector<DType> dtypes = {DType::kF32, DType::kBF16, DType::kF16, DType::kF32};
  std::vector<std::vector<uint8_t>> parts;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    parts.push_back(DrawAs(dtypes[i], i, kCount, std::pow(9.0, static_cast<double>(i))));
  }
  const auto accumulate = [&](InstructionSet set, bool wide) {
    std::vector<uint8_t> sum(kCount * (wide ? 8 : 4));
    for (size_t i = 0; i < parts.size(); ++i) {
      GetBlockKernels(set).accumulate({parts[i].data(), dtypes[i], 1.0 / 3}, sum.data(), wide,
                                      /*add=*/i > 0, 0, kCount);
    }
    return sum;
  };
  for (bool wide : {false, true}) {
    const std::vector<uint8_t> reference = accumulate(InstructionSet::kBaseline, wide);
    EXPECT_TRUE(accumulate(GetParam(), wide) == reference);
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x7F80u);  // toward zero
    const std::vector<uint8_t> bytes = accumulate(GetParam(), wide);
    _mm_setcsr(before);
    EXPECT_TRUE(bytes == reference) << "rounding toward zero";
#endif
  }
}

// Subnormal gradients count: nothing flushes them on the way.
TEST_P(EachInstructionSet, SubnormalsAreKept) {
  CpuDevice device(uint64_t{1} << 30);
  SteppedModule module(device);
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.hyperparameters.lr = 1;
  module.Create({SteppedModule::Parameter("w", {3})}, config);
  const float tiny = std::ldexp(1.0F, -149);
  module.instruction_set = GetParam();
  module.Set<float>("w", {0, 0, 0});
  ASSERT_TRUE(module.Step({{"w", SteppedModule::Bytes<float>({tiny, -tiny, 0})}}).ok());
  EXPECT_EQ(module.Get<float>("w"), (std::vector<float>{-tiny, tiny, 0}));
}

INSTANTIATE_TEST_SUITE_P(StepDeterminism, EachInstructionSet, ::testing::ValuesIn(kInstructionSets),
                         [](const auto& info) { return TestName(info.param); });

// So many that the threads share the planning too; tensors that have stepped more often than
// others, in two groups.
TEST(StepDeterminism, ManySmallTensorsGiveTheSameBitsForAnyThreads) {
  constexpr size_t kTensors = 1500;
  const auto step_many = [](size_t threads) {
    CpuDevice device(uint64_t{1} << 30);
    SteppedModule module(device);
    module.compute = std::make_shared<ComputePool>(threads);
    std::vector<TensorSpec> specs;
    const auto size = [](size_t i) { return i % 9 * 30; };
    for (size_t i = 0; i < kTensors; ++i) {
      specs.push_back(SteppedModule::Parameter(absl::StrCat(i % 5 == 0 ? "a" : "b", i),
                                               {static_cast<int64_t>(size(i))},
                                               i % 4 == 0 ? DType::kBF16 : DType::kF32));
    }
    OptimizerConfig config;
    config.algorithm = Algorithm::kNAdam;  // it has a product beside the step count
    config.max_grad_norm = 1;
    ParameterGroup group;
    group.name = "a";
    group.hyperparameters.lr = 0.3;
    group.selection.globs = {"a*"};
    config.groups = {group};
    module.Create(specs, config);
    for (size_t step = 1; step <= 4; ++step) {
      SteppedModule::Push push;
      for (size_t i = 0; i < kTensors; ++i) {
        if (i % step != 0) continue;
        push.push_back({specs[i].name, DrawAs(specs[i].dtype, step * kTensors + i, size(i), 1)});
      }
      const absl::StatusOr<StepResult> result = module.Step(push);
      EXPECT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(result->updated, push.size());
      EXPECT_EQ(result->skipped, kTensors - push.size());
    }
    for (size_t i = 0; i < kTensors; ++i) {
      const uint64_t steps = 1 + (i % 2 == 0) + (i % 3 == 0) + (i % 4 == 0);
      EXPECT_EQ(module.state.parameters[i].step, steps) << i;
    }
    return BytesOf(module);
  };
  const AllBytes reference = step_many(1);
  for (size_t threads : {2, 5}) EXPECT_TRUE(step_many(threads) == reference) << threads;
}

TEST(StepDeterminism, NormDoesNotDependOnTheOrderOfThePush) {
  constexpr size_t kTensors = 50;
  constexpr uint64_t kSeed = 7;
  CpuDevice device(uint64_t{1} << 30);
  SteppedModule module(device);
  std::vector<TensorSpec> specs;
  SteppedModule::Push push;
  for (size_t i = 0; i < kTensors; ++i) {
    specs.push_back(SteppedModule::Parameter(absl::StrCat("p", i), {3}));
    // Of many magnitudes, so that every other order of addition rounds differently.
    std::vector<float> values = DrawMany<float>(i, 3);
    for (float& value : values) value = std::ldexp(value * 1.2345678f, static_cast<int>(i % 9));
    push.push_back({absl::StrCat("p", i), SteppedModule::Bytes(values)});
  }
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  module.Create(std::move(specs), config);
  const double norm = module.Step(push)->grad_norm;
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 20; ++round) {
    std::shuffle(push.begin(), push.end(), random);
    EXPECT_EQ(module.Step(push)->grad_norm, norm) << "seed " << kSeed << " round " << round;
  }
}

}  // namespace
}  // namespace modelstate
