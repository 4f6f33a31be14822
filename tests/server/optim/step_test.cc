#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/server/optim/step_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

using testing::DrawMany;
using ::testing::ElementsAre;
using testing::SteppedModule;

OptimizerConfig AdamW() {
  OptimizerConfig config;
  config.algorithm = Algorithm::kAdamW;
  config.hyperparameters.lr = 0.01;
  return config;
}

OptimizerConfig Sgd(double lr, double momentum = 0) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.hyperparameters.lr = lr;
  config.hyperparameters.momentum = momentum;
  return config;
}

std::vector<uint8_t> Drawn(uint64_t stream, size_t count) {
  return SteppedModule::Bytes(DrawMany<float>(stream, count));
}

// Fails at one chosen allocation.
class FailingSource : public MemorySource {
 public:
  explicit FailingSource(int* left) : left_(left) {}
  void* Allocate(size_t bytes) override {
    if (*left_ == 0) return nullptr;
    if (*left_ > 0) --*left_;
    return inner_.Allocate(bytes);
  }
  void Free(void* ptr, size_t bytes) override { inner_.Free(ptr, bytes); }

 private:
  int* const left_;  // negative: never fails
  HostMemorySource inner_;
};

struct StateBytes {
  std::vector<uint64_t> steps;
  std::vector<std::vector<uint8_t>> slots;
  friend bool operator==(const StateBytes&, const StateBytes&) = default;
};

StateBytes Dump(const OptimizerState& state) {
  StateBytes bytes;
  for (const ParameterState& parameter : state.parameters) {
    bytes.steps.push_back(parameter.step);
    for (const RefPtr<TensorStorage>& slot : parameter.slots) {
      if (!slot) {
        bytes.slots.emplace_back();
        continue;
      }
      bytes.slots.push_back(BytesOf(*slot));
    }
  }
  return bytes;
}

class StepTest : public ::testing::Test {
 protected:
  CpuDevice device_{uint64_t{1} << 30};
  SteppedModule module_{device_};
};

TEST_F(StepTest, NewParameterIsTheGradientsStorage) {
  module_.Create({SteppedModule::Parameter("w", {3})}, Sgd(0.5));
  module_.Set<float>("w", {1, 2, 3});
  const StorageRef old = module_.version.storages[0];
  absl::StatusOr<GradientSet> gradients =
      module_.Stage({{"w", SteppedModule::Bytes<float>({2, 2, 4})}});
  ASSERT_TRUE(gradients.ok()) << gradients.status();
  const void* staged = gradients->entries[0].storage.get();
  StepOptions options;
  options.hyperparameters = *module_.optimizer->Resolve({});
  std::vector<Contribution> contributions(1);
  contributions[0].parts.push_back({*std::move(gradients)});
  absl::StatusOr<StepResult> result = ApplyOptimizerStep(
      module_.version, *module_.optimizer, options, contributions, module_.state, *module_.compute);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->applied);
  EXPECT_EQ(result->storages[0].get(), staged);
  EXPECT_THAT(SteppedModule::As<float>(BytesOf(*result->storages[0])), ElementsAre(0, 1, 1));
  EXPECT_THAT(SteppedModule::As<float>(BytesOf(*old)), ElementsAre(1, 2, 3));
  EXPECT_EQ(result->updated, 1u);
  EXPECT_FLOAT_EQ(result->grad_norm, std::sqrt(24.0));
}

TEST_F(StepTest, ParameterWithoutGradientIsSkippedWhole) {
  OptimizerConfig config = AdamW();
  config.hyperparameters.weight_decay = 0.5;
  module_.Create({SteppedModule::Parameter("a", {4}), SteppedModule::Parameter("b", {4})}, config);
  module_.Set<float>("b", {1, 2, 3, 4});
  absl::StatusOr<StepResult> result = module_.Step({{"a", Drawn(1, 4)}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->updated, 1u);
  EXPECT_EQ(result->skipped, 1u);
  EXPECT_FALSE(result->storages[1]);
  EXPECT_THAT(module_.Get<float>("b"), ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(module_.state.parameters[1].step, 0u);
  EXPECT_FALSE(module_.state.parameters[1].slots[1]);
  // Its own count: the first step of `b` corrects the bias of one step.
  ASSERT_TRUE(module_.Step({{"b", Drawn(2, 4)}}).ok());
  EXPECT_EQ(module_.state.parameters[1].step, 1u);
}

TEST_F(StepTest, BufferValueIsAssignedAsItIs) {
  module_.Create({SteppedModule::Parameter("w", {2}), SteppedModule::Buffer("mean", {2}),
                  SteppedModule::Buffer("count", {}, DType::kI64)},
                 Sgd(1));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  absl::StatusOr<StepResult> result =
      module_.Step({{"mean", SteppedModule::Bytes<float>({7, nan})},
                    {"w", SteppedModule::Bytes<float>({3, 4})},
                    {"count", SteppedModule::Bytes<int64_t>({41})}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->applied) << "a buffer's value is not a gradient: it need not be finite";
  EXPECT_DOUBLE_EQ(result->grad_norm, 5);
  EXPECT_EQ(module_.Get<float>("mean")[0], 7);
  EXPECT_TRUE(std::isnan(module_.Get<float>("mean")[1]));
  EXPECT_THAT(module_.Get<int64_t>("count"), ElementsAre(41));
  EXPECT_THAT(module_.Get<float>("w"), ElementsAre(-3, -4));
}

TEST_F(StepTest, TiedParameterIsUpdatedOnce) {
  TensorSpec tied = SteppedModule::Parameter("head", {2});
  tied.alias_of = "embed";
  module_.Create({SteppedModule::Parameter("embed", {2}), tied}, Sgd(1));
  absl::StatusOr<StepResult> result = module_.Step({{"head", SteppedModule::Bytes<float>({1, 2})}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(module_.Get<float>("embed"), ElementsAre(-1, -2));
  EXPECT_THAT(module_.Get<float>("head"), ElementsAre(-1, -2));
  EXPECT_EQ(result->updated, 1u);
  EXPECT_EQ(result->skipped, 0u);
}

TEST_F(StepTest, GradScaleDividesBeforeClipping) {
  OptimizerConfig config = Sgd(1);
  config.max_grad_norm = 1.0;
  module_.Create({SteppedModule::Parameter("w", {2})}, config);
  absl::StatusOr<StepResult> result =
      module_.Step({{"w", SteppedModule::Bytes<float>({3 * 1024, 4 * 1024})}}, 1024.0);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_DOUBLE_EQ(result->grad_norm, 5);
  EXPECT_DOUBLE_EQ(result->clip_coef, 1 / (5 + 1e-6));
  EXPECT_NEAR(module_.Get<float>("w")[0], -0.6, 1e-6);
  for (double bad : {0.0, -1.0, std::nan(""), 1e300}) {
    EXPECT_EQ(GetReason(module_.Step({{"w", Drawn(1, 2)}}, bad).status()), Reason::kInvalidField)
        << bad;
  }
}

TEST_F(StepTest, NonfiniteGradientChangesNothing) {
  OptimizerConfig config = AdamW();
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 12; ++i) {
    specs.push_back(SteppedModule::Parameter(absl::StrCat("p", i), {5000}));
  }
  specs.push_back(SteppedModule::Buffer("mean", {1}));
  module_.Create(specs, config);
  ASSERT_TRUE(module_.Step({{"p0", Drawn(1, 5000)}}).ok());
  const StateBytes before = Dump(module_.state);
  const std::vector<StorageRef> storages = module_.version.storages;
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    SteppedModule::Push push = {{"mean", SteppedModule::Bytes<float>({1})}};
    for (int i = 0; i < 12; ++i) {
      std::vector<float> gradient = DrawMany<float>(i, 5000);
      gradient[i % 2 == 0 ? 4999 : 0] = bad;
      push.push_back({absl::StrCat("p", i), SteppedModule::Bytes(gradient)});
    }
    absl::StatusOr<StepResult> result = module_.Step(push);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_FALSE(result->applied);
    EXPECT_EQ(result->nonfinite.size(), 10u);
    EXPECT_EQ(result->nonfinite[0], "p0");
    EXPECT_EQ(Dump(module_.state), before);
    EXPECT_EQ(module_.version.storages, storages);
  }
}

TEST_F(StepTest, OneNonfiniteElementIsFoundWhereverItIs) {
  constexpr size_t kSize = 4096 + 101;  // a block and what is left of one
  module_.Create({SteppedModule::Parameter("w", {kSize})}, AdamW());
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    for (size_t at = 0; at < kSize; at += at < 4096 ? 127 : 1) {
      std::vector<float> gradient(kSize, 1);
      gradient[at] = bad;
      absl::StatusOr<StepResult> result = module_.Step({{"w", SteppedModule::Bytes(gradient)}});
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_FALSE(result->applied) << at;
    }
  }
}

TEST_F(StepTest, ElementsWhoseSquaresOverflowAreFinite) {
  module_.Create({SteppedModule::Parameter("w", {3}, DType::kF64)}, Sgd(1));
  absl::StatusOr<StepResult> result =
      module_.Step({{"w", SteppedModule::Bytes<double>({1e200, 1, -1e300})}});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->applied);
  EXPECT_EQ(result->grad_norm, std::numeric_limits<double>::infinity());
  EXPECT_EQ(module_.Get<double>("w"), (std::vector<double>{-1e200, -1, 1e300}));
}

// The squares are infinite, and stay so. torch's fused code leaves the parameter as it is; what
// does not fuse subtracts one infinity from the other.
TEST_F(StepTest, SquaresThatOverflowLeaveACenteredRmspropAsItIs) {
  for (double momentum : {0.0, 0.9}) {
    OptimizerConfig config;
    config.algorithm = Algorithm::kRmsprop;
    config.hyperparameters.centered = true;
    config.hyperparameters.momentum = momentum;
    module_.Create({SteppedModule::Parameter("w", {9})}, config);
    const std::vector<float> large(9, 1e30F);
    for (int step = 0; step < 3; ++step) {
      const auto result = module_.Step({{"w", SteppedModule::Bytes<float>(large)}});
      ASSERT_TRUE(result.ok()) << result.status();
      ASSERT_TRUE(result->applied);
    }
    EXPECT_EQ(module_.Get<float>("w"), std::vector<float>(9, 0)) << momentum;
    EXPECT_TRUE(std::isinf(module_.Slot<float>("w", 1)[0]));
  }
}

TEST_F(StepTest, OverflowOfUnscalingIsNonfinite) {
  module_.Create({SteppedModule::Parameter("w", {1})}, Sgd(1));
  absl::StatusOr<StepResult> result =
      module_.Step({{"w", SteppedModule::Bytes<float>({1e30f})}}, 1e-20);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->applied);
  EXPECT_THAT(result->nonfinite, ElementsAre("w"));
}

TEST_F(StepTest, MomentsAreWrittenInPlace) {
  module_.Create({SteppedModule::Parameter("w", {100})}, AdamW());
  ASSERT_TRUE(module_.Step({{"w", Drawn(1, 100)}}).ok());
  const TensorStorage* moment = module_.state.parameters[0].slots[1].get();
  ASSERT_TRUE(module_.Step({{"w", Drawn(2, 100)}}).ok());
  EXPECT_EQ(module_.state.parameters[0].slots[1].get(), moment);
}

TEST_F(StepTest, HeldStateIsNotWritten) {
  constexpr size_t kSize = 10000;
  SteppedModule other(device_);
  for (SteppedModule* module : {&module_, &other}) {
    module->Create({SteppedModule::Parameter("w", {kSize}),
                    SteppedModule::Parameter("h", {kSize}, DType::kBF16)},
                   AdamW());
  }
  const std::vector<uint8_t> half(2 * kSize, 0x3c);
  for (uint64_t step = 1; step <= 4; ++step) {
    const OptimizerState held = module_.state;  // as a save holds it
    const StateBytes before = Dump(held);
    ASSERT_TRUE(module_.Step({{"w", Drawn(step, kSize)}, {"h", half}}).ok());
    EXPECT_EQ(Dump(held), before);
    ASSERT_TRUE(other.Step({{"w", Drawn(step, kSize)}, {"h", half}}).ok());
  }
  // Out of place and in place compute the same.
  EXPECT_EQ(Dump(module_.state), Dump(other.state));
  EXPECT_EQ(module_.Get<float>("w"), other.Get<float>("w"));
  EXPECT_EQ(module_.Get<uint16_t>("h"), other.Get<uint16_t>("h"));
}

TEST_F(StepTest, CachedDigestOfAMomentIsForgotten) {
  module_.Create({SteppedModule::Parameter("w", {100})}, AdamW());
  ASSERT_TRUE(module_.Step({{"w", Drawn(1, 100)}}).ok());
  const uint64_t digest = *module_.state.parameters[0].slots[1]->Digest();
  ASSERT_TRUE(module_.Step({{"w", Drawn(2, 100)}}).ok());
  EXPECT_NE(*module_.state.parameters[0].slots[1]->Digest(), digest);
}

TEST(StepMemory, OutOfMemoryLeavesStateUntouched) {
  int left = -1;
  CpuDevice device(std::make_unique<FailingSource>(&left), uint64_t{1} << 30);
  SteppedModule module(device);
  // Different sizes, so that nothing of the pool is reused.
  module.Create({SteppedModule::Parameter("a", {10}), SteppedModule::Parameter("b", {20}),
                 SteppedModule::Parameter("h", {30}, DType::kBF16)},
                AdamW());
  ASSERT_TRUE(module.Step({{"a", Drawn(1, 10)}}).ok());
  const SteppedModule::Push push = {
      {"a", Drawn(1, 10)}, {"b", Drawn(2, 20)}, {"h", std::vector<uint8_t>(60, 0x3c)}};
  const OptimizerState held = module.state;  // so that `a` needs fresh moments
  const StateBytes before = Dump(module.state);
  const std::vector<StorageRef> storages = module.version.storages;
  // 3 gradients, 2 moments of a and b, 3 slots of h: all but those that the pool has.
  int failures = 0;
  for (int n = 0;; ++n) {
    ASSERT_LT(n, 20);
    device.pool()->Trim();
    left = n;
    absl::StatusOr<StepResult> result = module.Step(push);
    left = -1;
    if (result.ok()) break;
    ++failures;
    EXPECT_EQ(GetReason(result.status()), Reason::kDeviceMemory) << result.status();
    EXPECT_TRUE(GetRetryAfter(result.status()).has_value());
    EXPECT_EQ(Dump(module.state), before) << "allocation " << n;
    EXPECT_EQ(module.version.storages, storages);
    EXPECT_EQ(module.budget->used(), 0u);
  }
  EXPECT_EQ(failures, 10);
  EXPECT_EQ(module.state.parameters[0].step, 2u);
}

TEST(StepMemory, OutOfMemoryOnOneOfManyThreadsLeavesStateUntouched) {
  constexpr size_t kTensors = 2000;
  int left = -1;
  CpuDevice device(std::make_unique<FailingSource>(&left), uint64_t{1} << 30);
  SteppedModule module(device);
  module.compute = std::make_shared<ComputePool>(4);
  std::vector<TensorSpec> specs;
  SteppedModule::Push push;
  for (size_t i = 0; i < kTensors; ++i) {
    specs.push_back(SteppedModule::Parameter(absl::StrCat("p", i), {3}));
    push.push_back({specs[i].name, Drawn(i, 3)});
  }
  module.Create(std::move(specs), AdamW());
  ASSERT_TRUE(module.Step(push).ok());
  const OptimizerState held = module.state;  // so that all need fresh moments
  const StateBytes before = Dump(module.state);
  const std::vector<StorageRef> storages = module.version.storages;
  const uint64_t used = device.pool()->usage().used_bytes;
  int failures = 0;
  for (int n = 0;; ++n) {
    ASSERT_LT(n, 100);
    device.pool()->Trim();
    left = n;
    const absl::Status error = module.Step(push).status();
    left = -1;
    if (error.ok()) break;
    ++failures;
    EXPECT_EQ(GetReason(error), Reason::kDeviceMemory) << error;
    EXPECT_EQ(Dump(module.state), before) << "allocation " << n;
    EXPECT_EQ(module.version.storages, storages);
    EXPECT_EQ(device.pool()->usage().used_bytes, used);
  }
  EXPECT_GT(failures, 8);  // slabs for 2000 gradients and 4000 moments
  EXPECT_EQ(module.state.parameters[kTensors - 1].step, 2u);
}

TEST(StepMemory, SteadyStateAllocatesNothing) {
  int left = -1;
  CpuDevice device(std::make_unique<FailingSource>(&left), uint64_t{1} << 30);
  SteppedModule module(device);
  module.Create({SteppedModule::Parameter("w", {1 << 20}), SteppedModule::Parameter("b", {100}),
                 SteppedModule::Buffer("mean", {7})},
                AdamW());
  auto push = [](uint64_t step) {
    return SteppedModule::Push{
        {"w", Drawn(step, 1 << 20)}, {"b", Drawn(step, 100)}, {"mean", Drawn(step, 7)}};
  };
  ASSERT_TRUE(module.Step(push(1)).ok());
  const BufferPool::Usage warm = device.pool()->usage();
  left = 0;  // the source is empty from here on
  for (uint64_t step = 2; step <= 6; ++step) {
    absl::StatusOr<StepResult> result = module.Step(push(step));
    ASSERT_TRUE(result.ok()) << result.status();
    const BufferPool::Usage usage = device.pool()->usage();
    EXPECT_EQ(usage.used_bytes, warm.used_bytes);
    EXPECT_EQ(usage.pooled_bytes, warm.pooled_bytes);
  }
}

TEST_F(StepTest, MomentumMayBeSwitchedOnAndOffByAStep) {
  module_.Create({SteppedModule::Parameter("w", {1}, DType::kBF16)}, Sgd(1, 0.5));
  const std::vector<uint8_t> one = SteppedModule::Bytes<uint16_t>({0x3f80});
  ASSERT_TRUE(module_.Step({{"w", one}}).ok());
  EXPECT_THAT(module_.Slot<float>("w", 1), ElementsAre(1));
  GroupOverride off;
  off.hyperparameters.momentum = 0;
  ASSERT_TRUE(module_.Step({{"w", one}}, std::nullopt, {off}).ok());
  EXPECT_THAT(module_.Slot<float>("w", 0), ElementsAre(-2)) << "the master";
  EXPECT_THAT(module_.Slot<float>("w", 1), ElementsAre(1)) << "kept, as torch keeps it";
  ASSERT_TRUE(module_.Step({{"w", one}}).ok());
  EXPECT_THAT(module_.Slot<float>("w", 1), ElementsAre(1.5f));
  EXPECT_THAT(module_.Slot<float>("w", 0), ElementsAre(-3.5f));
}

TEST_F(StepTest, GroupsHaveTheirOwnHyperparameters) {
  OptimizerConfig config = Sgd(1);
  ParameterGroup group;
  group.name = "slow";
  group.selection.prefixes = {"slow."};
  group.hyperparameters.lr = 0.5;
  config.groups = {group};
  module_.Create({SteppedModule::Parameter("w", {1}), SteppedModule::Parameter("slow.w", {1})},
                 config);
  const std::vector<uint8_t> one = SteppedModule::Bytes<float>({1});
  ASSERT_TRUE(module_.Step({{"w", one}, {"slow.w", one}}).ok());
  EXPECT_THAT(module_.Get<float>("w"), ElementsAre(-1));
  EXPECT_THAT(module_.Get<float>("slow.w"), ElementsAre(-0.5f));
  GroupOverride twice;
  twice.group = 0;
  twice.hyperparameters.lr = 2;
  ASSERT_TRUE(module_.Step({{"w", one}, {"slow.w", one}}, std::nullopt, {twice}).ok());
  EXPECT_THAT(module_.Get<float>("w"), ElementsAre(-2));
  EXPECT_THAT(module_.Get<float>("slow.w"), ElementsAre(-2.5f));
}

}  // namespace
}  // namespace modelstate
