// Worker against a real server in this process, which stops and starts again.
#include "client/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "server/rpc/server.h"

namespace modelstate::client {
namespace {

class WorkerTest : public testing::Test {
 protected:
  WorkerTest() {
    root_ = std::filesystem::path(testing::TempDir()) / absl::StrCat("worker_test_", getpid());
    std::filesystem::remove_all(root_);
    options_.listen = "localhost:0";
    options_.device = "cpu";
    options_.device_memory_bytes = uint64_t{1} << 30;
    options_.compute_threads = 1;
    options_.checkpoint_root = root_.string();
    patient_.initial_backoff = absl::Milliseconds(5);
    patient_.max_backoff = absl::Milliseconds(50);
    patient_.patience = absl::Seconds(60);
  }
  ~WorkerTest() override {
    server_.reset();
    std::filesystem::remove_all(root_);
  }

  void SetUp() override {
    StartServer();
    CreateModel();
    Configure(1);
  }

  void StartServer() {
    absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    options_.listen = server_->address();  // the same again after a restart
  }
  Client Connect() {
    ClientOptions options;
    options.max_attempts = 1;
    options.initial_backoff = absl::Milliseconds(1);
    return *Client::Connect(server_->address(), options);
  }
  void CreateModel() {
    TensorSpec spec;
    spec.name = "w";
    spec.shape = *Shape::Create({4});
    ASSERT_TRUE(Connect().CreateModule("m", absl::MakeConstSpan(&spec, 1)).ok());
  }
  void Configure(uint32_t quorum) {
    OptimizerConfig config;
    config.algorithm = Algorithm::kSgd;
    config.hyperparameters.lr = 1;
    config.rounds.quorum = quorum;
    const auto configured = Connect().ConfigureOptimizer("m", config);
    ASSERT_TRUE(configured.ok()) << configured.status();
  }

  // A gradient of which every element is `value`. Lives as long as the test.
  absl::Span<const TensorRef> Gradient(float value) {
    absl::MutexLock lock(&mutex_);
    auto held = std::make_unique<Held>();
    held->values.assign(4, value);
    held->ref.spec.name = "w";
    held->ref.spec.kind = TensorKind::kGradient;
    held->ref.spec.shape = *Shape::Create({4});
    held->ref.bytes =
        absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(held->values.data()), 16);
    held_.push_back(std::move(held));
    return absl::MakeConstSpan(&held_.back()->ref, 1);
  }
  float Weight() {
    absl::StatusOr<StateDict> state = Connect().Fetch("m");
    EXPECT_TRUE(state.ok()) << state.status();
    float value = 0;
    std::memcpy(&value, state->bytes(0).data(), 4);
    return value;
  }
  uint64_t Step() { return Connect().GetModule("m")->step; }

  struct Held {
    std::vector<float> values;
    TensorRef ref;
  };
  ServerOptions options_;
  WorkerOptions patient_;
  std::filesystem::path root_;
  std::unique_ptr<Server> server_;
  absl::Mutex mutex_;
  std::vector<std::unique_ptr<Held>> held_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(WorkerTest, NumbersItsPushesAndSaysWhatTheyAreBasedOn) {
  Worker worker(Connect(), "m", "w1", patient_);
  const absl::StatusOr<StateDict> weights = worker.Fetch();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(worker.base(), weights->version());
  const uint64_t first = worker.sequence();
  const absl::StatusOr<StepResult> step = worker.Push(Gradient(1));
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->outcome, StepOutcome::kApplied);
  EXPECT_EQ(worker.sequence(), first + 1);
  EXPECT_EQ(Weight(), -1);
}

TEST_F(WorkerTest, ASecondLifeOfANameGoesOnAboveTheFirst) {
  {
    Worker worker(Connect(), "m", "w1", patient_);
    ASSERT_TRUE(worker.Push(Gradient(1)).ok());
  }
  {
    Worker worker(Connect(), "m", "w1", patient_);
    const absl::StatusOr<StepResult> step = worker.Push(Gradient(2));
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_FALSE(step->replayed);
  }
  // Also where that was ahead of this machine's clock.
  StepOptions ahead;
  ahead.worker = "w1";
  ahead.sequence = uint64_t{1} << 62;
  ASSERT_TRUE(Connect().ApplyStep("m", Gradient(4), ahead).ok());
  Worker worker(Connect(), "m", "w1", patient_);
  ASSERT_TRUE(worker.Push(Gradient(8)).ok());
  EXPECT_EQ(worker.sequence(), ahead.sequence + 1);
  EXPECT_EQ(Weight(), -15);
}

TEST_F(WorkerTest, AnEarlierLifeThatGoesOnIsTold) {
  Worker first(Connect(), "m", "w1", patient_);
  ASSERT_TRUE(first.Push(Gradient(1)).ok());
  Worker second(Connect(), "m", "w1", patient_);
  ASSERT_TRUE(second.Push(Gradient(2)).ok());
  EXPECT_EQ(GetReason(first.Push(Gradient(4)).status()), Reason::kSequenceReused);
  EXPECT_TRUE(second.Push(Gradient(8)).ok());
  EXPECT_EQ(Weight(), -11);
}

TEST_F(WorkerTest, AccumulatesAndSteps) {
  Worker worker(Connect(), "m", "w1", patient_);
  ASSERT_TRUE(worker.Accumulate(Gradient(1)).ok());
  EXPECT_EQ(worker.Accumulate(Gradient(2))->accumulated, 2u);
  EXPECT_EQ(Step(), 0u);
  ASSERT_TRUE(worker.Push(Gradient(4)).ok());
  EXPECT_EQ(Step(), 1u);
  EXPECT_EQ(Weight(), -7);
}

TEST_F(WorkerTest, WaitsForItsRound) {
  Configure(3);
  std::vector<std::thread> threads;
  std::vector<absl::StatusOr<StepResult>> results(3);
  for (int w = 0; w < 3; ++w) {
    threads.emplace_back([&, w, gradient = Gradient(static_cast<float>(w))] {
      Worker worker(Connect(), "m", absl::StrCat("w", w), patient_);
      for (int step = 0; step < 5; ++step) {
        results[w] = worker.Push(gradient);
        if (!results[w].ok()) return;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) {
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->outcome, StepOutcome::kApplied);
    EXPECT_EQ(result->contributions, 3u);
  }
  EXPECT_EQ(Step(), 5u);
  EXPECT_EQ(Weight(), -5);
}

TEST_F(WorkerTest, ADeadlineEndsTheWaitAndAgainGoesOnWithIt) {
  Configure(2);
  Worker worker(Connect(), "m", "w1", patient_);
  PushOptions options;
  Cancellation deadline(absl::Now() + absl::Milliseconds(200));
  options.cancellation = &deadline;
  EXPECT_TRUE(absl::IsDeadlineExceeded(worker.Push(Gradient(2), options).status()));
  const uint64_t sequence = worker.sequence();
  PushOptions no_wait;
  no_wait.wait = false;
  ASSERT_TRUE(Worker(Connect(), "m", "w2", patient_).Push(Gradient(4), no_wait).ok());
  PushOptions again;
  again.again = true;
  const absl::StatusOr<StepResult> step = worker.Push(Gradient(2), again);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->outcome, StepOutcome::kApplied);
  EXPECT_TRUE(step->replayed);
  EXPECT_EQ(worker.sequence(), sequence);
  EXPECT_EQ(Weight(), -3) << "each counted once";
}

TEST_F(WorkerTest, AContributionThatWasLostWithTheServerIsSentWhole) {
  Worker worker(Connect(), "m", "w1", patient_);  // without a base: it is not told of the restart
  ASSERT_TRUE(worker.Push(Gradient(1)).ok());
  Configure(2);
  ASSERT_TRUE(Connect().SaveCheckpoint("m", "saved").ok());
  absl::StatusOr<StepResult> step;
  std::thread push([&] { step = worker.Push(Gradient(2)); });
  const Client client = Connect();
  while (!client.GetOptimizer("m")->round) {
  }
  server_.reset();
  StartServer();
  LoadCheckpointOptions load;
  load.create_module = true;
  ASSERT_TRUE(Connect().LoadCheckpoint("m", "saved", load).ok());
  const absl::StatusOr<StepResult> other = Worker(Connect(), "m", "w2", patient_).Push(Gradient(4));
  push.join();
  ASSERT_TRUE(step.ok()) << step.status();
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(step->contributions, 2u);
  EXPECT_EQ(Weight(), -4);
}

TEST_F(WorkerTest, ARoundThatIsGivenUpIsPushedAgain) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.hyperparameters.lr = 1;
  config.rounds.quorum = 2;
  const Client client = Connect();
  ASSERT_TRUE(client.ConfigureOptimizer("m", config).ok());
  PushOptions options;
  options.overrides.resize(1);
  options.overrides[0].group = 0;
  options.overrides[0].hyperparameters.lr = 8;
  absl::StatusOr<StepResult> step;
  std::thread push(
      [&] { step = Worker(Connect(), "m", "w1", patient_).Push(Gradient(2), options); });
  while (!client.GetOptimizer("m")->round) {
  }
  // Group 0 is another now, so what the override was for is not known.
  config.groups.resize(1);
  config.groups[0].selection.globs = {"none*"};
  config.rounds.quorum = 1;
  const auto configured = client.ConfigureOptimizer("m", config);
  push.join();
  ASSERT_TRUE(configured.ok()) << configured.status();
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->outcome, StepOutcome::kApplied);
  EXPECT_EQ(step->contributions, 1u);
  EXPECT_EQ(Weight(), -2);
}

TEST_F(WorkerTest, WaitsUntilItMayContributeAgain) {
  Configure(2);
  PushOptions no_wait;
  no_wait.wait = false;
  Worker worker(Connect(), "m", "w1", patient_);
  ASSERT_EQ(worker.Push(Gradient(1), no_wait)->outcome, StepOutcome::kPending);
  std::thread other([&] {
    Worker w2(Connect(), "m", "w2", patient_);
    EXPECT_TRUE(w2.Push(Gradient(3)).ok());
    EXPECT_TRUE(w2.Push(Gradient(3)).ok());
  });
  const absl::StatusOr<StepResult> second = worker.Push(Gradient(1));
  other.join();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->step, 2u);
  EXPECT_EQ(Weight(), -4);
}

TEST_F(WorkerTest, WhatWasAccumulatedIsPushedAgainAfterALoad) {
  ASSERT_TRUE(Connect().SaveCheckpoint("m", "saved").ok());
  Worker worker(Connect(), "m", "w1", patient_);
  ASSERT_TRUE(worker.Accumulate(Gradient(1)).ok());
  ASSERT_TRUE(Connect().LoadCheckpoint("m", "saved").ok());
  EXPECT_EQ(GetReason(worker.Push(Gradient(2)).status()), Reason::kAccumulationLost);
  ASSERT_TRUE(worker.Accumulate(Gradient(1)).ok());
  ASSERT_TRUE(worker.Push(Gradient(2)).ok());
  EXPECT_EQ(Weight(), -3);
}

TEST_F(WorkerTest, SurvivesARestartFromACheckpointAndSaysWhatWasLost) {
  Worker worker(Connect(), "m", "w1", patient_);
  ASSERT_TRUE(worker.Fetch().ok());
  ASSERT_TRUE(worker.Push(Gradient(1)).ok());
  ASSERT_TRUE(Connect().SaveCheckpoint("m", "saved").ok());
  ASSERT_TRUE(worker.Push(Gradient(2)).ok());  // acknowledged, and lost with the server
  ASSERT_TRUE(worker.Accumulate(Gradient(4)).ok());

  server_.reset();
  std::thread restart([this] {
    StartServer();
    LoadCheckpointOptions load;
    load.create_module = true;
    EXPECT_TRUE(Connect().LoadCheckpoint("m", "saved", load).ok());
  });
  // Goes on through the time without a server, and without a module; then it is told.
  const absl::StatusOr<StepResult> step = worker.Push(Gradient(8));
  restart.join();
  EXPECT_EQ(GetReason(step.status()), Reason::kIncarnationChanged) << step.status();
  EXPECT_THAT(
      std::string(step.status().message()),
      testing::AllOf(testing::HasSubstr("at step 1"), testing::HasSubstr("told of step 2")));
  EXPECT_EQ(GetErrorMetadata(step.status())["step"], "1");
  EXPECT_EQ(Weight(), -1);
  const absl::StatusOr<StateDict> weights = worker.Fetch();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->step(), 1u);
  const absl::StatusOr<StepResult> again = worker.Push(Gradient(2));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->step, 2u);
  EXPECT_EQ(Weight(), -3);
}

TEST_F(WorkerTest, ItsPatienceEnds) {
  WorkerOptions options = patient_;
  options.patience = absl::Milliseconds(50);
  Worker worker(Connect(), "m", "w1", options);
  server_.reset();
  EXPECT_TRUE(absl::IsUnavailable(worker.Push(Gradient(1)).status()));
  StartServer();
  // The module is gone with the server: that is waited for as long. With a connection that is
  // there: to find the server again may take more than this patience.
  Worker connected(Connect(), "m", "w1", options);
  const absl::StatusOr<StepResult> gone = connected.Push(Gradient(1));
  EXPECT_EQ(GetReason(gone.status()), Reason::kModuleNotFound);
  EXPECT_EQ(GetReason(connected.Fetch().status()), Reason::kModuleNotFound);
}

TEST_F(WorkerTest, ErrorsOfThePushAreItsOwn) {
  Worker worker(Connect(), "m", "w1", patient_);
  TensorRef wrong = Gradient(1)[0];
  wrong.spec.name = "nobody";
  EXPECT_EQ(GetReason(worker.Push(absl::MakeConstSpan(&wrong, 1)).status()), Reason::kUnknownKey);
  EXPECT_TRUE(worker.Push(Gradient(1)).ok());
  EXPECT_EQ(Step(), 1u);
}

}  // namespace
}  // namespace modelstate::client
