// Rounds, accumulation, gradients of other dtypes and groups, as a caller sees them.
#include <thread>

#include "absl/time/clock.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

class RoundRpcsTest : public ServerTest {
 protected:
  void SetUp() override {
    ServerTest::SetUp();
    CreateTiny();
  }

  absl::StatusOr<v1::Optimizer> ConfigureRounds(uint32_t quorum) {
    config_.set_module("tiny");
    config_.mutable_optimizer()->set_algorithm(v1::SGD);
    config_.mutable_optimizer()->mutable_hyperparameters()->set_lr(1);
    if (quorum > 0) config_.mutable_optimizer()->mutable_rounds()->set_quorum(quorum);
    return Call(&v1::ModelState::Stub::ConfigureOptimizer, config_);
  }

  static std::vector<v1::StepPart> BiasPush(const std::string& worker, uint64_t sequence,
                                            float value, bool wait = false) {
    std::vector<v1::StepPart> parts =
        StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({value, value})}});
    parts[0].mutable_header()->set_worker(worker);
    parts[0].mutable_header()->set_sequence(sequence);
    parts[0].mutable_header()->set_wait(wait);
    return parts;
  }

  std::vector<float> Bias() { return FloatsOf(FetchAll("tiny").Bytes()["bias"]); }

  v1::Optimizer Optimizer() {
    v1::GetOptimizerRequest request;
    request.set_module("tiny");
    absl::StatusOr<v1::Optimizer> optimizer = Call(&v1::ModelState::Stub::GetOptimizer, request);
    EXPECT_TRUE(optimizer.ok()) << optimizer.status();
    return optimizer.value_or(v1::Optimizer());
  }
  // For what another thread, or the server, does on its own.
  bool WaitForContributions(uint32_t count) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (Optimizer().round().contributions() != count) {
      if (absl::Now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }

  v1::ConfigureOptimizerRequest config_;
};

TEST_F(RoundRpcsTest, WhoWaitsIsAnsweredWhenTheRoundCloses) {
  ASSERT_TRUE(ConfigureRounds(3).ok());
  std::vector<absl::StatusOr<v1::ApplyStepResponse>> answers(2);
  std::vector<std::thread> workers;
  for (int w = 0; w < 2; ++w) {
    workers.emplace_back(
        [&, w] { answers[w] = Push(BiasPush(absl::StrCat("w", w), 1, 3.0F, true)); });
  }
  ASSERT_TRUE(WaitForContributions(2));
  EXPECT_THAT(Optimizer().round().workers(), ElementsAre("w0", "w1"));
  EXPECT_GT(Optimizer().round_memory_bytes(), 0);
  EXPECT_EQ(Optimizer().worker_count(), 2);
  const auto last = Push(BiasPush("w2", 1, 6));
  for (std::thread& worker : workers) worker.join();
  ASSERT_TRUE(last.ok()) << last.status();
  for (const auto& answer : answers) {
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_EQ(answer->outcome(), v1::APPLIED);
    EXPECT_EQ(answer->contributions(), 3);
    EXPECT_EQ(answer->version().number(), last->version().number());
  }
  EXPECT_THAT(Bias(), ElementsAre(-3.5F, -4.5F));
  EXPECT_FALSE(Optimizer().has_round());
}

TEST_F(RoundRpcsTest, AWaitThatIsCancelledStillCountsAndIsAnsweredLater) {
  ASSERT_TRUE(ConfigureRounds(2).ok());
  {
    grpc::ClientContext context;
    v1::ApplyStepResponse response;
    auto writer = stub_->ApplyStep(&context, &response);
    for (const v1::StepPart& part : BiasPush("w1", 1, 1, true)) ASSERT_TRUE(writer->Write(part));
    writer->WritesDone();
    ASSERT_TRUE(WaitForContributions(1));
    context.TryCancel();
    EXPECT_EQ(writer->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  // It does not count as running until the round closes.
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (Call(&v1::ModelState::Stub::GetServerInfo, v1::GetServerInfoRequest())
             ->limits()
             .running_calls() > 1) {
    ASSERT_LT(absl::Now(), deadline);
    std::this_thread::yield();
  }
  ASSERT_TRUE(Push(BiasPush("w2", 1, 3)).ok());
  const auto header_alone = Push({BiasPush("w1", 1, 1, true)[0]});
  ASSERT_TRUE(header_alone.ok()) << header_alone.status();
  EXPECT_TRUE(header_alone->replayed());
  EXPECT_EQ(header_alone->outcome(), v1::APPLIED);
  EXPECT_THAT(Bias(), ElementsAre(-1.5F, -2.5F));
}

TEST_F(RoundRpcsTest, APushThatIsCancelledBeforeItsTrailerLeavesNoTrace) {
  ASSERT_TRUE(ConfigureRounds(2).ok());
  {
    grpc::ClientContext context;
    v1::ApplyStepResponse response;
    auto writer = stub_->ApplyStep(&context, &response);
    const std::vector<v1::StepPart> parts = BiasPush("w1", 1, 1);
    for (size_t i = 0; i + 1 < parts.size(); ++i) ASSERT_TRUE(writer->Write(parts[i]));
    context.TryCancel();
    EXPECT_FALSE(writer->Finish().ok());
  }
  EXPECT_EQ(Push(BiasPush("w2", 1, 3))->outcome(), v1::PENDING);
  EXPECT_EQ(Push(BiasPush("w1", 1, 1))->outcome(), v1::APPLIED);
}

TEST_F(RoundRpcsTest, RoundTimeoutClosesByItself) {
  v1::Rounds* rounds = config_.mutable_optimizer()->mutable_rounds();
  rounds->set_min_contributions(1);
  rounds->mutable_round_timeout()->set_nanos(20'000'000);
  ASSERT_TRUE(ConfigureRounds(2).ok());
  const auto answer = Push(BiasPush("w1", 1, 1, true));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->outcome(), v1::APPLIED);
  EXPECT_EQ(answer->contributions(), 1);
  EXPECT_EQ(answer->quorum(), 2);
}

// A whole repeat of a contribution whose round ends without it, between its header and its trailer.
TEST_F(RoundRpcsTest, ARepeatOfWhatIsGivenUpMeanwhileIsPushedAgain) {
  absl::StatusOr<v1::ApplyStepResponse> answer;
  // Where the server comes to the header only after the change, the repeat is a first push.
  for (int attempt = 0; attempt < 100; ++attempt) {
    ASSERT_TRUE(ConfigureRounds(2).ok());
    std::vector<v1::StepPart> parts = BiasPush("w1", 1, 1);
    parts[0].mutable_header()->add_group_overrides()->mutable_hyperparameters()->set_momentum(0.9);
    ASSERT_TRUE(Push(parts).ok());
    grpc::ClientContext context;
    v1::ApplyStepResponse response;
    auto writer = stub_->ApplyStep(&context, &response);
    for (size_t i = 0; i + 1 < parts.size(); ++i) ASSERT_TRUE(writer->Write(parts[i]));
    Optimizer();  // has come by the same connection, after those
    ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.1).ok());  // has no momentum, nor rounds
    writer->Write(parts.back());
    writer->WritesDone();
    const absl::Status status = FromGrpcStatus(writer->Finish());
    ASSERT_FALSE(status.ok()) << "AdamW has no momentum to override";
    answer = status;
    if (GetReason(status) != Reason::kInvalidField) break;
  }
  EXPECT_THAT(answer, FailsWith(Reason::kRoundGivenUp));
  EXPECT_TRUE(GetRetryAfter(answer.status()).has_value());
  EXPECT_EQ(Push(BiasPush("w1", 1, 1))->outcome(), v1::APPLIED) << "the same sequence";
}

TEST_F(RoundRpcsTest, DrainTellsThoseThatWait) {
  ASSERT_TRUE(ConfigureRounds(2).ok());
  absl::StatusOr<v1::ApplyStepResponse> answer;
  std::thread worker([&] { answer = Push(BiasPush("w1", 1, 1, true)); });
  EXPECT_TRUE(WaitForContributions(1));
  server_->Drain();
  worker.join();
  EXPECT_THAT(answer, FailsWith(Reason::kDraining));
}

TEST_F(RoundRpcsTest, ARoundThatWasOpenWhenItWasSavedIsPushedAgain) {
  ASSERT_TRUE(ConfigureRounds(2).ok());
  ASSERT_TRUE(Push(BiasPush("w1", 1, 1)).ok());
  ASSERT_TRUE(Push(BiasPush("w2", 1, 1)).ok());
  ASSERT_TRUE(Push(BiasPush("w1", 2, 1)).ok());
  const auto run = [&](auto method, const auto& request, auto response) {
    grpc::ClientContext context;
    auto reader = (stub_.get()->*method)(&context, request);
    while (reader->Read(&response)) {
    }
    return FromGrpcStatus(reader->Finish());
  };
  v1::SaveCheckpointRequest save;
  save.set_module("tiny");
  save.set_path("saved");
  ASSERT_TRUE(run(&v1::ModelState::Stub::SaveCheckpoint, save, v1::SaveCheckpointResponse()).ok());
  server_.reset();
  StartServer();
  v1::LoadCheckpointRequest load;
  load.set_module("tiny");
  load.set_path("saved");
  load.set_create_module(true);
  ASSERT_TRUE(run(&v1::ModelState::Stub::LoadCheckpoint, load, v1::LoadCheckpointResponse()).ok());
  EXPECT_EQ(Optimizer().config().rounds().quorum(), 2);
  EXPECT_EQ(Optimizer().worker_count(), 2) << "before any of them has pushed again";
  EXPECT_GT(Optimizer().round_memory_bytes(), 0);
  const auto done = Push({BiasPush("w2", 1, 1)[0]});
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_TRUE(done->replayed());
  EXPECT_EQ(Push(BiasPush("w1", 2, 1))->outcome(), v1::PENDING) << "it was lost with the server";
  EXPECT_EQ(Push(BiasPush("w2", 2, 1))->outcome(), v1::APPLIED);
  EXPECT_THAT(Bias(), ElementsAre(-1.5F, -2.5F));
}

TEST_F(RoundRpcsTest, RoundsThatDoNotFitAreRefusedWithTheWayOut) {
  Create("large", {Tensor("w", v1::PARAMETER, {1 << 20})});  // 4 MiB of 256
  config_.set_module("large");
  config_.mutable_optimizer()->set_algorithm(v1::SGD);
  config_.mutable_optimizer()->mutable_rounds()->set_quorum(64);
  const auto refused = Call(&v1::ModelState::Stub::ConfigureOptimizer, config_);
  EXPECT_THAT(refused, FailsWith(Reason::kPushMemory));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("--push_memory_bytes"));
  config_.mutable_optimizer()->mutable_rounds()->set_quorum(32);
  EXPECT_TRUE(Call(&v1::ModelState::Stub::ConfigureOptimizer, config_).ok());
}

TEST_F(RoundRpcsTest, AccumulatedPushesAreOneStep) {
  ASSERT_TRUE(ConfigureRounds(0).ok());
  std::vector<v1::StepPart> parts = BiasPush("w1", 1, 1);
  parts[0].mutable_header()->set_accumulate(true);
  const auto first = Push(parts);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->outcome(), v1::ACCUMULATED);
  EXPECT_EQ(first->accumulated(), 1);
  // The same payload as a step is another push.
  EXPECT_THAT(Push(BiasPush("w1", 1, 1)), FailsWith(Reason::kSequenceReused));
  parts = BiasPush("w1", 2, 2);
  parts[0].mutable_header()->set_accumulated(2);
  EXPECT_THAT(Push(parts), FailsWith(Reason::kAccumulationLost));
  parts[0].mutable_header()->set_accumulated(1);
  ASSERT_TRUE(Push(parts).ok());
  EXPECT_THAT(Bias(), ElementsAre(-2.5F, -3.5F));
}

TEST_F(RoundRpcsTest, GradientsMayBeNarrowerThanTheirParameter) {
  ASSERT_TRUE(ConfigureRounds(0).ok());
  std::string halves(8, '\0');
  const uint16_t bf16[4] = {0x3f80, 0x4000, 0x3c00, 0xc000};  // BF16 1, 2; F16 1, -2
  std::memcpy(halves.data(), bf16, 8);
  v1::TensorInfo bias = Tensor("bias", v1::GRADIENT, {2}, v1::BF16);
  ASSERT_TRUE(Push(StepParts("tiny", {{bias, halves.substr(0, 4)}})).ok());
  EXPECT_THAT(Bias(), ElementsAre(-0.5F, -2.5F));
  bias.set_dtype(v1::F16);
  ASSERT_TRUE(Push(StepParts("tiny", {{bias, halves.substr(4, 4)}})).ok());
  EXPECT_THAT(Bias(), ElementsAre(-1.5F, -0.5F));
  // Nothing of it stays.
  EXPECT_EQ(Call(&v1::ModelState::Stub::GetServerInfo, v1::GetServerInfoRequest())
                ->limits()
                .push_memory_used_bytes(),
            0);
}

TEST_F(RoundRpcsTest, ParametersInNoGroupAreNamedAndTakeNoGradient) {
  config_.mutable_optimizer()->set_no_default_group(true);
  v1::ParameterGroup* group = config_.mutable_optimizer()->add_groups();
  group->set_name("weights");
  group->mutable_selection()->add_names("weight");
  const auto configured = ConfigureRounds(0);
  ASSERT_TRUE(configured.ok()) << configured.status();
  EXPECT_EQ(configured->ungrouped_count(), 1);
  EXPECT_THAT(configured->ungrouped(), ElementsAre("bias"));
  v1::ListTensorsRequest list;
  list.set_module("tiny");
  const auto parameters = Call(&v1::ModelState::Stub::ListParameters, list);
  ASSERT_EQ(parameters->tensors_size(), 2);
  EXPECT_TRUE(parameters->tensors(0).has_group());
  EXPECT_EQ(parameters->tensors(0).group(), 0);
  EXPECT_FALSE(parameters->tensors(1).has_group());
  const auto refused = Push(BiasPush("w1", 1, 1));
  EXPECT_THAT(refused, FailsWith(Reason::kNotInAGroup));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("\"bias\""));
}

TEST_F(RoundRpcsTest, ConfiguringAnewSaysWhatStateWasDropped) {
  config_.mutable_optimizer()->mutable_hyperparameters()->set_momentum(0.9);
  ASSERT_TRUE(ConfigureRounds(0).ok());
  ASSERT_TRUE(Push(BiasPush("w1", 1, 1)).ok());
  EXPECT_EQ(Optimizer().state_bytes(), 8);
  config_.mutable_optimizer()->mutable_hyperparameters()->set_lr(0.5);
  config_.mutable_optimizer()->mutable_hyperparameters()->set_momentum(0.8);
  EXPECT_EQ(Call(&v1::ModelState::Stub::ConfigureOptimizer, config_)->dropped_count(), 0);
  config_.mutable_optimizer()->mutable_hyperparameters()->clear_momentum();
  const auto dropped = Call(&v1::ModelState::Stub::ConfigureOptimizer, config_);
  EXPECT_EQ(dropped->dropped_count(), 1);
  EXPECT_THAT(dropped->dropped(), ElementsAre("momentum_buffer/bias"));
  EXPECT_EQ(dropped->state_bytes(), 0);

  // Adam and AdamW count as one.
  ASSERT_TRUE(Configure("tiny", v1::ADAM, 0.1).ok());
  ASSERT_TRUE(Push(BiasPush("w1", 2, 1)).ok());
  EXPECT_THAT(Configure("tiny", v1::ADAMW, 0.1)->dropped(), IsEmpty());
  EXPECT_EQ(Optimizer().state_bytes(), 16);
  EXPECT_THAT(Configure("tiny", v1::LION, 0.1)->dropped(),
              UnorderedElementsAre("exp_avg/bias", "exp_avg_sq/bias"));
}

}  // namespace
}  // namespace modelstate
