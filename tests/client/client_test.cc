#include "client/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "client/worker.h"
#include "common/base/digest.h"
#include "tests/client/fake_server.h"

namespace modelstate::client {
namespace {

using ::testing::ElementsAre;

class ClientTest : public ::testing::Test {
 protected:
  FakeServer server_;
  Client client_ = server_.Connect();
};

TEST_F(ClientTest, ErrorsKeepReasonAndMetadata) {
  const absl::Status status = client_.GetModule("x").status();
  EXPECT_EQ(GetReason(status), Reason::kModuleNotFound);
  EXPECT_EQ(GetErrorMetadata(status)["module"], "x");
  EXPECT_EQ(client_.GetModule("m")->state, ModuleState::kReady);
}

TEST_F(ClientTest, ListingsTurnPages) {
  const absl::StatusOr<TensorList> parameters = client_.ListParameters("m", {.digests = true});
  ASSERT_TRUE(parameters.ok()) << parameters.status();
  EXPECT_EQ(parameters->tensors.size(), 33u);
  EXPECT_EQ(parameters->tensors[0].spec.name, "layer1.weight");
  EXPECT_EQ(parameters->tensors[0].xxh3, Xxh3(server_.bytes(1)));
  EXPECT_EQ(client_.ListBuffers("m")->tensors.size(), 8u);
}

TEST_F(ClientTest, FetchIntoMemory) {
  uint64_t progress = 0;
  FetchOptions options;
  options.progress = [&](const Progress& value) { progress = value.done_bytes; };
  const absl::StatusOr<StateDict> state = client_.Fetch("m", options);
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_EQ(state->size(), server_.specs.size());
  for (size_t i = 0; i < state->size(); ++i) {
    EXPECT_EQ(state->specs()[i].name, server_.specs[i].name);
    EXPECT_EQ(state->bytes(i), server_.bytes(i)) << i;
  }
  EXPECT_EQ(state->bytes(*state->Find("tied.weight")), server_.bytes(7));
  EXPECT_EQ(state->version(), (Version{77, 5}));
  EXPECT_EQ(state->verified_digests(), 40u);
  EXPECT_EQ(progress, server_.layout.total_bytes());
  EXPECT_FALSE(state->Find("nothing").has_value());
}

TEST_F(ClientTest, FetchIntoUsesTheMemoryAgainWhereItIsEnough) {
  StateDict state;
  ASSERT_TRUE(client_.FetchInto("m", &state).ok());
  const uint8_t* const memory = state.data().data();
  ++server_.version;
  ASSERT_TRUE(client_.FetchInto("m", &state).ok());
  EXPECT_EQ(state.version(), (Version{77, 6}));
  // Breaks on the way leave no tensors, and the memory to the next attempt.
  server_.wrong_digest = true;
  EXPECT_EQ(GetReason(client_.FetchInto("m", &state)), Reason::kDigestMismatch);
  EXPECT_EQ(state.size(), 0u);
  EXPECT_TRUE(state.data().empty());
  server_.wrong_digest = false;
  server_.break_after.resize(server_.streams, UINT64_MAX);
  server_.break_after.push_back(20000);
  ASSERT_TRUE(client_.FetchInto("m", &state).ok());
  EXPECT_EQ(server_.streams, server_.break_after.size() + 1);
  EXPECT_EQ(state.data().data(), memory);
  for (size_t i = 0; i < state.size(); ++i) EXPECT_EQ(state.bytes(i), server_.bytes(i)) << i;
  // What fails before the tensors leaves them.
  EXPECT_FALSE(client_.FetchInto("x", &state).ok());
  EXPECT_EQ(state.size(), server_.specs.size());
  FetchOptions newer;
  newer.if_newer_than = state.version();
  ASSERT_TRUE(client_.FetchInto("m", &state, newer).ok());
  EXPECT_TRUE(state.not_modified());
  EXPECT_EQ(state.bytes(1), server_.bytes(1));
  // More than there is room for.
  server_.AddLargeTensor(5000000);
  ASSERT_TRUE(client_.FetchInto("m", &state).ok());
  EXPECT_FALSE(state.not_modified());
  EXPECT_EQ(state.bytes(server_.specs.size() - 1), server_.bytes(server_.specs.size() - 1));
}

TEST_F(ClientTest, FetchBeginsAgainAfterABreak) {
  server_.break_after = {0, 20000};
  const absl::StatusOr<StateDict> state = client_.Fetch("m");
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(server_.streams, 3u);
}

TEST_F(ClientTest, FetchRefusesWrongDigestsAndTruncation) {
  server_.wrong_digest = true;
  EXPECT_EQ(GetReason(client_.Fetch("m").status()), Reason::kDigestMismatch);
  server_.no_trailer = true;
  EXPECT_EQ(GetReason(client_.Fetch("m").status()), Reason::kChunkInvalid);
}

class StepTest : public ClientTest {
 protected:
  StepTest() {
    for (size_t i : {39, 1, 2}) {
      refs_.push_back({server_.specs[i], server_.bytes(i)});
      refs_.back().spec.kind = TensorKind::kGradient;
      bytes_.append(reinterpret_cast<const char*>(server_.bytes(i).data()),
                    server_.bytes(i).size());
    }
  }

  std::vector<TensorRef> refs_;
  std::string bytes_;
};

TEST_F(StepTest, SendsTensorsInOrder) {
  StepOptions options;
  options.worker = "w";
  options.sequence = 3;
  const absl::StatusOr<StepResult> result = client_.ApplyStep("m", refs_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, StepOutcome::kApplied);
  EXPECT_EQ(server_.step_bytes, bytes_);
  EXPECT_THAT(server_.step_names, ElementsAre("layer39.weight", "layer1.weight", "layer2.weight"));
  EXPECT_EQ(server_.step_headers[0].total_bytes(), bytes_.size());
}

TEST_F(StepTest, NamedStepsAreSentAgain) {
  server_.fail_steps = 2;
  StepOptions options;
  options.worker = "w";
  options.sequence = 3;
  const absl::StatusOr<StepResult> result = client_.ApplyStep("m", refs_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(server_.step_headers.size(), 3u);
  EXPECT_EQ(server_.step_headers[2].sequence(), 3u);
  EXPECT_TRUE(result->replayed) << "by the header alone";
  EXPECT_EQ(server_.step_bytes, "");
  // Where the server says that it has not seen the step, all of it goes out again.
  server_.fail_steps = 1;
  server_.forgets_steps = true;
  ASSERT_TRUE(client_.ApplyStep("m", refs_, options).ok());
  EXPECT_EQ(server_.step_bytes, bytes_);
}

TEST_F(StepTest, ChunksThatAreTooLargeForTheServerAreCutSmaller) {
  server_.max_chunk_bytes = 100;
  const absl::StatusOr<StepResult> result = client_.ApplyStep("m", refs_, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(server_.step_headers.size(), 2u);
  EXPECT_EQ(server_.step_bytes, bytes_);
}

TEST_F(StepTest, NamelessStepsAreNot) {
  server_.fail_steps = 1;
  EXPECT_TRUE(absl::IsUnavailable(client_.ApplyStep("m", refs_, {}).status()));
  EXPECT_EQ(server_.step_headers.size(), 1u);
}

TEST_F(StepTest, ReplayIsAHeaderAlone) {
  const absl::StatusOr<StepResult> result = client_.ReplayStep("m", "w", 3);
  ASSERT_TRUE(result.ok());
  EXPECT_TRUE(result->replayed);
}

// What a coordinator leaves the module in for a while: none, EMPTY, without an optimizer.
TEST_F(StepTest, AWorkerWaitsForAModuleThatIsNotThereYet) {
  WorkerOptions options;
  options.initial_backoff = absl::Milliseconds(1);
  server_.forgets_steps = true;
  const std::vector<Reason> states = {Reason::kModuleNotFound, Reason::kModuleEmpty,
                                      Reason::kNoOptimizer};
  server_.refusals = states;
  Worker worker(client_, "m", "w", options);
  const absl::StatusOr<StateDict> weights = worker.Fetch();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_TRUE(server_.refusals.empty());
  // Also one that has fetched nothing.
  server_.refusals = states;
  const absl::StatusOr<StepResult> step = Worker(client_, "m", "v", options).Push(refs_);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(server_.step_bytes, bytes_);
  // Not for ever.
  options.patience = absl::ZeroDuration();
  server_.refusals = states;
  EXPECT_EQ(GetReason(Worker(client_, "m", "u", options).Fetch().status()),
            Reason::kModuleNotFound);
}

TEST_F(StepTest, BytesMustFitTheSpec) {
  refs_[1].bytes.remove_suffix(1);
  const absl::Status status = client_.ApplyStep("m", refs_, {}).status();
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_EQ(server_.step_headers.size(), 0u);
}

TEST_F(ClientTest, WatchEndsWhenItsCallbackOrACancellationSaysSo) {
  uint64_t last = 0;
  const auto until = [&](uint64_t number) {
    return [&last, number](const WatchEvent& event) {
      last = event.module.version.number;
      return last < number;
    };
  };
  EXPECT_TRUE(client_.Watch("m", until(3)).ok());
  EXPECT_EQ(last, 3u);
  Cancellation cancellation;
  const absl::Status status = client_.Watch(
      "m",
      [&](const WatchEvent& event) {
        if (event.module.version.number == 2) cancellation.Cancel();
        return true;
      },
      &cancellation);
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
  EXPECT_TRUE(absl::IsCancelled(client_.Fetch("m", {}, &cancellation).status()));
}

TEST(Connect, SaysThatNobodyAnswers) {
  ClientOptions options;
  options.connect_timeout = absl::Milliseconds(100);
  EXPECT_TRUE(absl::IsUnavailable(Client::Connect("localhost:1", options).status()));
}

}  // namespace
}  // namespace modelstate::client
