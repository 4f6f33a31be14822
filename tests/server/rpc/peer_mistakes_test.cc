// Mistakes that other parameter servers have made, one test for each. docs/optimizers.md has the
// list.
#include <atomic>
#include <cmath>
#include <functional>
#include <thread>

#include "common/base/digest.h"
#include "tests/server/rpc/checkpoint_calls.h"

namespace modelstate {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::FloatNear;

class PeerMistakes : public CheckpointCalls {
 protected:
  absl::StatusOr<v1::Optimizer> ConfigureWith(const v1::OptimizerConfig& config) {
    v1::ConfigureOptimizerRequest request;
    request.set_module("m");
    *request.mutable_optimizer() = config;
    return Call(&v1::ModelState::Stub::ConfigureOptimizer, request);
  }
  static v1::OptimizerConfig Config(v1::Algorithm algorithm, double lr) {
    v1::OptimizerConfig config;
    config.set_algorithm(algorithm);
    config.mutable_hyperparameters()->set_lr(lr);
    return config;
  }

  // Every element of the gradient of "w" is `value`.
  absl::StatusOr<v1::ApplyStepResponse> Step(int64_t elements, float value) {
    return Push(StepParts("m", {{Tensor("w", v1::GRADIENT, {elements}),
                                 FloatBytes(std::vector<float>(elements, value))}}));
  }
  std::string Bytes(const std::string& name) { return FetchAll("m").Bytes()[name]; }

  // `begun` is called with the first news of the save.
  absl::Status Save(const std::string& path, const std::function<void()>& begun = {}) {
    grpc::ClientContext context;
    v1::SaveCheckpointRequest request;
    request.set_module("m");
    request.set_path(path);
    request.set_overwrite(true);
    auto reader = stub_->SaveCheckpoint(&context, request);
    v1::SaveCheckpointResponse event;
    for (bool first = true; reader->Read(&event); first = false) {
      if (first && begun) begun();
    }
    return FromGrpcStatus(reader->Finish());
  }
  void RestartFrom(const std::string& path) {
    server_.reset();
    StartServer();
    const auto loaded = LoadFile("m", path, {}, /*create=*/true);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
  }
  v1::ListTensorsResponse OptimizerState() {
    v1::ListTensorsRequest request;
    request.set_module("m");
    request.set_digests(true);
    return Call(&v1::ModelState::Stub::ListOptimizerState, request)
        .value_or(v1::ListTensorsResponse());
  }
};

TEST_F(PeerMistakes, BetasAreRestoredEachFromItsOwnAndPowersGrowOncePerStep) {
  constexpr int64_t kElements = 300'000;  // many blocks, shared by the threads
  v1::OptimizerConfig config = Config(v1::ADAMW, 0.5);
  config.mutable_hyperparameters()->set_beta1(0.5);
  config.mutable_hyperparameters()->set_beta2(0.75);
  config.mutable_hyperparameters()->set_weight_decay(0);
  config.mutable_hyperparameters()->set_eps(0);
  Create("m", {Tensor("w", v1::PARAMETER, {kElements})});
  ASSERT_TRUE(ConfigureWith(config).ok());
  // With one gradient all along the corrected moments are the gradient and its square, whatever the
  // betas: each step is lr, but only if their powers are those of this step.
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Step(kElements, 4).ok());
  EXPECT_THAT(FloatsOf(Bytes("w")), Each(FloatNear(-1.5F, 1e-5F)));
  ASSERT_TRUE(Save("saved").ok());
  ASSERT_TRUE(Step(kElements, -1).ok());
  const std::string went_on = Bytes("w");

  RestartFrom("saved");
  ASSERT_TRUE(Step(kElements, -1).ok());
  EXPECT_EQ(Bytes("w"), went_on);
  // By hand: exp_avg and exp_avg_sq of gradients 4, 4, 4, -1.
  const double m = 0.5 * 3.5 + 0.5 * -1;
  const double v = 0.75 * 16 * (1 - std::pow(0.75, 3)) + 0.25 * 1;
  const double step = 0.5 * (m / (1 - std::pow(0.5, 4))) / std::sqrt(v / (1 - std::pow(0.75, 4)));
  EXPECT_THAT(FloatsOf(Bytes("w")), Each(FloatNear(static_cast<float>(-1.5 - step), 1e-5F)));
}

TEST_F(PeerMistakes, OfPushesFromOneBaseOneIsFresh) {
  Create("m", {Tensor("w", v1::PARAMETER, {64})});
  v1::OptimizerConfig config = Config(v1::SGD, 1);
  config.set_max_staleness(0);
  const auto configured = ConfigureWith(config);
  ASSERT_TRUE(configured.ok()) << configured.status();
  v1::Version base = configured->version();
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> applied{0};
    std::atomic<int> stale{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 6; ++t) {
      threads.emplace_back([&] {
        std::vector<v1::StepPart> parts = StepParts(
            "m", {{Tensor("w", v1::GRADIENT, {64}), FloatBytes(std::vector<float>(64, -1))}});
        *parts[0].mutable_header()->mutable_base() = base;
        const auto answer = Push(parts);
        if (answer.ok()) {
          ++applied;
        } else if (GetReason(answer.status()) == Reason::kStaleBase) {
          ++stale;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_EQ(applied, 1);
    ASSERT_EQ(stale, 5);
    base = FetchAll("m").header.version();
  }
  EXPECT_THAT(FloatsOf(Bytes("w")), Each(20));
}

TEST_F(PeerMistakes, BuffersAreNeitherSteppedNorForgotten) {
  v1::TensorInfo batches = Tensor("bn.num_batches_tracked", v1::BUFFER, {}, v1::I64);
  batches.mutable_values()->mutable_ints()->add_values(41);
  Create("m", {WithValues(Tensor("w", v1::PARAMETER, {2}), {0, 0}),
               WithValues(Tensor("bn.running_mean", v1::BUFFER, {2}), {0.25, -3}), batches});
  v1::OptimizerConfig config = Config(v1::SGD, 1);
  config.mutable_hyperparameters()->set_weight_decay(0.5);
  config.mutable_rounds()->set_quorum(2);
  ASSERT_TRUE(ConfigureWith(config).ok());
  const auto push = [&](const std::string& worker, uint64_t sequence,
                        const std::vector<std::pair<v1::TensorInfo, std::string>>& tensors) {
    std::vector<v1::StepPart> parts = StepParts("m", tensors);
    parts[0].mutable_header()->set_worker(worker);
    parts[0].mutable_header()->set_sequence(sequence);
    return Push(parts);
  };
  const std::pair<v1::TensorInfo, std::string> gradient = {Tensor("w", v1::GRADIENT, {2}),
                                                           FloatBytes({1, 1})};
  ASSERT_TRUE(push("a", 1, {gradient}).ok());
  ASSERT_TRUE(push("b", 1, {gradient}).ok());
  EXPECT_THAT(FloatsOf(Bytes("bn.running_mean")), ElementsAre(0.25F, -3)) << "not stepped";

  // Statistics come with the push, and are in the version of its step.
  std::string count(8, '\0');
  count[0] = 42;
  ASSERT_TRUE(push("a", 2,
                   {gradient,
                    {Tensor("bn.running_mean", v1::BUFFER, {2}), FloatBytes({7, 8})},
                    {Tensor("bn.num_batches_tracked", v1::BUFFER, {}, v1::I64), count}})
                  .ok());
  const auto closed = push("b", 2, {gradient});
  ASSERT_TRUE(closed.ok()) << closed.status();
  Fetched state = FetchAll("m");
  EXPECT_EQ(state.header.version().number(), closed->version().number());
  EXPECT_THAT(FloatsOf(state.Bytes()["bn.running_mean"]), ElementsAre(7, 8));
  EXPECT_EQ(state.Bytes()["bn.num_batches_tracked"], count);
}

TEST_F(PeerMistakes, TheFirstStepIsStepOne) {
  Create("m", {Tensor("w", v1::PARAMETER, {2})});
  v1::OptimizerConfig config = Config(v1::ADAM, 0.5);
  config.mutable_hyperparameters()->set_eps(0);
  const auto configured = ConfigureWith(config);
  ASSERT_TRUE(configured.ok());
  EXPECT_EQ(configured->state_bytes(), 0);
  EXPECT_EQ(OptimizerState().tensors_size(), 0);
  ASSERT_TRUE(Step(2, 1e-3F).ok());
  EXPECT_THAT(FloatsOf(Bytes("w")), Each(FloatNear(-0.5F, 1e-5F))) << "with t = 2 it is -0.37";
  EXPECT_THAT(OptimizerState().tensors(0).values().doubles().values(), ElementsAre(1));
}

TEST_F(PeerMistakes, MomentsOfNarrowParametersComeBackAsTheyWere) {
  Create("m", {Tensor("w", v1::PARAMETER, {512}, v1::BF16)});
  ASSERT_TRUE(ConfigureWith(Config(v1::ADAM, 0.01)).ok());
  const auto step = [&](float value) {
    return Push(StepParts(
        "m", {{Tensor("w", v1::GRADIENT, {512}), FloatBytes(std::vector<float>(512, value))}}));
  };
  ASSERT_TRUE(step(0.1F).ok());
  ASSERT_TRUE(step(0.3F).ok());
  ASSERT_TRUE(Save("saved").ok());
  const v1::ListTensorsResponse before = OptimizerState();
  ASSERT_EQ(before.tensors_size(), 4);
  ASSERT_TRUE(step(-0.7F).ok());
  const std::string went_on = Bytes("w");

  RestartFrom("saved");
  const v1::ListTensorsResponse after = OptimizerState();
  ASSERT_EQ(after.tensors_size(), 4);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(after.tensors(i).slot(), before.tensors(i).slot());
    EXPECT_EQ(after.tensors(i).dtype(), v1::F32);
    EXPECT_EQ(after.tensors(i).xxh3(), before.tensors(i).xxh3()) << after.tensors(i).slot();
  }
  ASSERT_TRUE(step(-0.7F).ok());
  EXPECT_EQ(Bytes("w"), went_on);
}

TEST_F(PeerMistakes, AFailedPushIsToldAndPublishesNothing) {
  Create("m", {Tensor("w", v1::PARAMETER, {1 << 19}), Tensor("b", v1::PARAMETER, {4})});
  ASSERT_TRUE(ConfigureWith(Config(v1::ADAMW, 0.1)).ok());
  const std::string before = StateOf("m");
  std::vector<v1::StepPart> parts = StepParts(
      "m", {{Tensor("w", v1::GRADIENT, {1 << 19}), FloatBytes(std::vector<float>(1 << 19, 1))},
            {Tensor("b", v1::GRADIENT, {4}), FloatBytes({1, 1, 1, 1})}});
  ASSERT_GT(parts.size(), 4u) << "several chunks";

  std::vector<v1::StepPart> gap = parts;
  gap.erase(gap.begin() + 3);
  EXPECT_THAT(Push(gap), FailsWith(Reason::kChunkInvalid));
  std::vector<v1::StepPart> damaged = parts;
  v1::TensorDigest* digest = damaged.back().mutable_trailer()->add_digests();
  digest->set_index(1);
  digest->set_xxh3("0000000000000000");
  EXPECT_THAT(Push(damaged), FailsWith(Reason::kDigestMismatch));
  std::vector<v1::StepPart> truncated = parts;
  truncated.pop_back();
  EXPECT_FALSE(Push(truncated).ok());
  EXPECT_EQ(StateOf("m"), before);
  EXPECT_EQ(OptimizerState().tensors_size(), 0);
  EXPECT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
  EXPECT_TRUE(Push(parts).ok());
}

TEST_F(PeerMistakes, ASaveHoldsWhatWasCurrentWhenItWasAskedFor) {
  constexpr int64_t kElements = 1 << 18;
  Create("m", {Tensor("w", v1::PARAMETER, {kElements})});
  v1::OptimizerConfig config = Config(v1::SGD, 1);
  config.mutable_hyperparameters()->set_momentum(0.5);
  ASSERT_TRUE(ConfigureWith(config).ok());
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> sent{0};
  std::atomic<uint64_t> acknowledged{0};
  std::thread trainer([&] {
    while (!stop) {
      ++sent;
      const auto answer = Step(kElements, 1);
      if (answer.ok()) acknowledged = answer->step();
    }
  });
  for (int i = 0; i < 5; ++i) {
    const uint64_t before = acknowledged;
    uint64_t by_then = 0;
    ASSERT_TRUE(Save(absl::StrCat("saved", i), [&] { by_then = sent; }).ok());
    EXPECT_GE(acknowledged, before);
    const auto loaded = LoadFile(absl::StrCat("copy", i), absl::StrCat("saved", i), {}, true);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const uint64_t step = loaded->load().module().step();
    EXPECT_GE(step, before);
    EXPECT_LE(step, by_then) << "nothing that was sent after the save had begun";
    // Parameter and momentum both of that step: p_n = p_{n-1} - b_n with b_n = b_{n-1} / 2 + 1.
    float parameter = 0;
    float buffer = 0;
    for (uint64_t n = 1; n <= step; ++n) {
      buffer = n == 1 ? 1 : buffer * 0.5F + 1;
      parameter = parameter - buffer;
    }
    EXPECT_THAT(FloatsOf(FetchAll(absl::StrCat("copy", i)).Bytes()["w"]), Each(parameter)) << step;
    v1::ListTensorsRequest list;
    list.set_module(absl::StrCat("copy", i));
    list.set_statistics(true);
    const auto state = Call(&v1::ModelState::Stub::ListOptimizerState, list);
    ASSERT_TRUE(state.ok()) << state.status();
    if (step == 0) continue;
    ASSERT_EQ(state->tensors_size(), 2);
    EXPECT_EQ(state->tensors(1).statistics().min(), buffer) << step;
    EXPECT_EQ(state->tensors(1).statistics().max(), buffer) << step;
  }
  stop = true;
  trainer.join();
}

}  // namespace
}  // namespace modelstate
