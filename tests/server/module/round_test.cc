#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "tests/server/module/module_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::Eq;
using ::testing::HasSubstr;

class RoundTest : public ModuleFixture {
 protected:
  void MakeWith(uint32_t quorum, double lr = 1) {
    module_ = MakeModule({Parameter("a", {4}), Parameter("b", {2}), Buffer("mean", {2})}, 0);
    config_ = Sgd(lr);
    config_.rounds.quorum = quorum;
    ASSERT_TRUE(Configure(*module_, config_).ok());
  }

  static StepRequest As(const std::string& worker, uint64_t sequence, double weight = 1) {
    StepRequest request;
    request.worker = worker;
    request.sequence = sequence;
    request.weight = weight;
    request.payload_digest = absl::StrCat(worker, " ", sequence);
    return request;
  }

  absl::StatusOr<StepAnswer> Contribute(const std::string& worker, uint64_t sequence, float value,
                                        double weight = 1) {
    return Push(*module_, {{"a", value}}, As(worker, sequence, weight));
  }
  // Staged where a call stages it.
  absl::StatusOr<StepAnswer> PushInRound(const std::vector<PushTensor>& push, StepRequest request) {
    MS_ASSIGN_OR_RETURN(request.gradients, StageIn(*module_->push_budget(), *module_, push));
    return Apply(*module_, std::move(request));
  }

  // An answer that may come later.
  struct Waiting {
    absl::Notification done;
    absl::StatusOr<StepAnswer> answer;
  };
  std::unique_ptr<Waiting> ContributeAndWait(const std::string& worker, uint64_t sequence,
                                             float value) {
    StepRequest request = As(worker, sequence);
    request.gradients = *Stage(*module_, {{"a", value}});
    return Wait(std::move(request));
  }
  std::unique_ptr<Waiting> Wait(StepRequest request) {
    request.wait = true;
    auto waiting = std::make_unique<Waiting>();
    module_->ApplyStep(std::move(request), [w = waiting.get()](absl::StatusOr<StepAnswer> answer) {
      w->answer = std::move(answer);
      w->done.Notify();
    });
    Settle();
    return waiting;
  }
  absl::StatusOr<VersionRef> Move(ModuleInstance& module, DType dtype) {
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module.Move(nullptr, dtype, std::move(done));
    });
  }
  // What was given to the strand before this is done after it.
  void Settle() { Capture(*module_).status().IgnoreError(); }
  void Tick() {
    module_->Tick();
    Settle();
  }

  std::vector<float> Values(const std::string& name) {
    const VersionRef version = module_->Current();
    const std::vector<uint8_t> bytes = BytesOf(*version->storages[*version->schema->Find(name)]);
    std::vector<float> values(bytes.size() / 4);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  std::shared_ptr<ModuleInstance> module_;
  OptimizerConfig config_;
};

TEST_F(RoundTest, QuorumOfDistinctWorkersIsOneStepOfTheMean) {
  MakeWith(3);
  absl::StatusOr<StepAnswer> first = Contribute("w1", 1, 1);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->outcome, StepOutcome::kPending);
  EXPECT_EQ(first->contributions, 1u);
  EXPECT_EQ(first->quorum, 3u);
  EXPECT_EQ(Contribute("w2", 1, 2)->contributions, 2u);
  EXPECT_THAT(Values("a"), ElementsAre(0, 0, 0, 0));
  const ModuleInstance::TrainingInfo info = module_->training_info();
  EXPECT_THAT(info.round.workers, ElementsAre("w1", "w2"));
  EXPECT_EQ(info.round.open_time, now_);
  EXPECT_EQ(info.round.staged_bytes, 32u);

  absl::StatusOr<StepAnswer> last = Contribute("w3", 1, 6);
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(last->outcome, StepOutcome::kApplied);
  EXPECT_EQ(last->contributions, 3u);
  EXPECT_EQ(last->step, 1u);
  EXPECT_THAT(Values("a"), ElementsAre(-3, -3, -3, -3));
  EXPECT_EQ(module_->training_info().round.contributions, 0u);
  // What the others are told when they ask again.
  StepRequest again = As("w1", 1);
  absl::StatusOr<StepAnswer> answer = Apply(*module_, std::move(again));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(answer->replayed);
  EXPECT_EQ(answer->outcome, StepOutcome::kApplied);
  EXPECT_EQ(answer->version, last->version);
}

// A round may be open for longer than a worker may be silent: who contributed is not.
TEST_F(RoundTest, AWorkerIsRememberedFromTheEndOfItsRound) {
  worker_limits_.expiry = absl::Minutes(1);
  MakeWith(2);
  ASSERT_TRUE(Contribute("w1", 1, 1).ok());
  now_ += absl::Minutes(2);
  Tick();
  ASSERT_TRUE(Contribute("w2", 1, 1).ok());
  Tick();
  absl::StatusOr<StepAnswer> again = Contribute("w1", 1, 1);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->replayed);
  EXPECT_EQ(again->outcome, StepOutcome::kApplied);
  EXPECT_EQ(module_->training_info().round.contributions, 0u) << "it counted once";
  now_ += absl::Minutes(1);
  Tick();
  EXPECT_EQ(module_->training_info().workers, 0u);
}

// A peer counted requests, so that one retry completed a round.
TEST_F(RoundTest, ARetryDoesNotCompleteARound) {
  MakeWith(2);
  ASSERT_TRUE(Contribute("w1", 1, 1).ok());
  for (int i = 0; i < 3; ++i) {
    absl::StatusOr<StepAnswer> again = Contribute("w1", 1, 1);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(again->replayed);
    EXPECT_EQ(again->outcome, StepOutcome::kPending);
    EXPECT_EQ(again->contributions, 1u);
  }
  absl::StatusOr<StepAnswer> next = Contribute("w1", 2, 1);
  EXPECT_THAT(ReasonOf(next), Eq(Reason::kAlreadyContributed));
  EXPECT_TRUE(GetRetryAfter(next.status()).has_value());
  EXPECT_EQ(module_->Current()->step, 0u);
  EXPECT_EQ(Contribute("w2", 1, 3)->outcome, StepOutcome::kApplied);
  EXPECT_THAT(Values("a"), ElementsAre(-2, -2, -2, -2));
  EXPECT_EQ(Contribute("w1", 2, 1)->outcome, StepOutcome::kPending);
}

TEST_F(RoundTest, HasTheSameBitsInEveryOrderOfArrival) {
  // Of magnitudes at which every other order of addition rounds differently.
  const std::vector<float> gradients = {1e8F, 1.0F, -1e8F, 0.3F};
  const std::vector<double> weights = {1, 3, 0.7, 2};
  std::vector<size_t> order(gradients.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::optional<std::string> bits;
  do {
    MakeWith(4, 0.1);
    for (size_t w : order) {
      ASSERT_TRUE(Contribute(absl::StrCat("w", w), 1, gradients[w], weights[w]).ok());
    }
    ASSERT_EQ(module_->Current()->step, 1u);
    const std::string now = Contents(*module_->Current())["a"];
    if (!bits) bits = now;
    ASSERT_EQ(now, *bits) << order[0] << order[1] << order[2] << order[3];
  } while (std::next_permutation(order.begin(), order.end()));
  // As it is defined: by name, each share rounded to a float.
  float mean = 0;
  for (size_t w = 0; w < gradients.size(); ++w) {
    const float term = gradients[w] * static_cast<float>(weights[w] / 6.7);
    mean = w == 0 ? term : mean + term;
  }
  EXPECT_EQ(Values("a")[0], 0.0F + -0.1F * mean);
}

TEST_F(RoundTest, ATensorThatSomeLackCountsAsZeroOneThatAllLackIsSkipped) {
  MakeWith(2);
  ASSERT_TRUE(Push(*module_, {{"a", 4}}, As("w1", 1)).ok());
  absl::StatusOr<StepAnswer> answer = Push(*module_, {{"a", 2}}, As("w2", 1));
  ASSERT_TRUE(answer.ok());
  EXPECT_EQ(answer->updated, 1u);
  EXPECT_EQ(answer->skipped, 1u);
  EXPECT_THAT(Values("b"), ElementsAre(0, 0));
  ASSERT_TRUE(Push(*module_, {{"a", 4}, {"b", 2}}, As("w1", 2)).ok());
  ASSERT_TRUE(Push(*module_, {{"a", 4}}, As("w2", 2)).ok());
  EXPECT_THAT(Values("b"), ElementsAre(-1, -1));
}

TEST_F(RoundTest, BuffersAreThoseOfTheFirstWorkerByNameThatSentAny) {
  MakeWith(3);
  ASSERT_TRUE(Push(*module_, {{"a", 1}, {"mean", 9, TensorKind::kBuffer}}, As("w9", 1)).ok());
  ASSERT_TRUE(Push(*module_, {{"a", 1}, {"mean", 5, TensorKind::kBuffer}}, As("w5", 1)).ok());
  EXPECT_THAT(Values("mean"), ElementsAre(0, 0)) << "before the round has closed";
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, As("w1", 1)).ok());
  EXPECT_THAT(Values("mean"), ElementsAre(5, 5));
}

TEST_F(RoundTest, WaitHoldsTheAnswerUntilTheRoundCloses) {
  MakeWith(2);
  auto waiting = ContributeAndWait("w1", 1, 1);
  EXPECT_FALSE(waiting->done.HasBeenNotified());
  // The same worker asks again, with its header alone: both wait.
  auto again = Wait(As("w1", 1));
  EXPECT_FALSE(waiting->done.HasBeenNotified());
  EXPECT_FALSE(again->done.HasBeenNotified());
  ASSERT_TRUE(Contribute("w2", 1, 3).ok());
  for (const auto& each : {std::cref(waiting), std::cref(again)}) {
    ASSERT_TRUE(each.get()->done.HasBeenNotified());
    ASSERT_TRUE(each.get()->answer.ok()) << each.get()->answer.status();
    EXPECT_EQ(each.get()->answer->outcome, StepOutcome::kApplied);
    EXPECT_EQ(each.get()->answer->version, module_->Current()->version);
    EXPECT_EQ(each.get()->answer->replayed, &each.get() == &again);
  }
}

TEST_F(RoundTest, AWaitEndsAloneWhenItsCallerGoes) {
  MakeWith(2);
  StepRequest request = As("w1", 1);
  request.gradients = *Stage(*module_, {{"a", 1}});
  request.call = &request;
  auto gone = Wait(std::move(request));
  auto again = Wait(As("w1", 1));
  module_->EndWait("w1", &request);
  module_->EndWait("nobody", &request);
  Settle();
  ASSERT_TRUE(gone->done.HasBeenNotified());
  EXPECT_TRUE(absl::IsCancelled(gone->answer.status()));
  EXPECT_FALSE(again->done.HasBeenNotified());
  ASSERT_TRUE(Contribute("w2", 1, 3).ok()) << "the contribution counts";
  EXPECT_EQ(again->answer->contributions, 2u);
}

TEST_F(RoundTest, TimeoutClosesARoundThatHasEnough) {
  MakeWith(4);
  config_.rounds.min_contributions = 2;
  config_.rounds.round_timeout = absl::Seconds(10);
  ASSERT_TRUE(Configure(*module_, config_).ok());
  auto waiting = ContributeAndWait("w1", 1, 2);
  now_ += absl::Seconds(9);
  ASSERT_TRUE(Contribute("w2", 1, 4).ok());
  Tick();
  EXPECT_EQ(module_->Current()->step, 0u);
  now_ += absl::Seconds(1);
  Tick();
  EXPECT_EQ(module_->Current()->step, 1u);
  ASSERT_TRUE(waiting->done.HasBeenNotified());
  EXPECT_EQ(waiting->answer->contributions, 2u);
  EXPECT_THAT(Values("a"), ElementsAre(-3, -3, -3, -3)) << "the mean of those that came";

  // With too few it stays open, and closes as soon as there are enough.
  ASSERT_TRUE(Contribute("w3", 1, 1).ok());
  now_ += absl::Seconds(60);
  Tick();
  EXPECT_EQ(module_->Current()->step, 1u);
  EXPECT_EQ(Contribute("w4", 1, 1)->outcome, StepOutcome::kApplied);
}

TEST_F(RoundTest, QuorumCanChangeWhileARoundIsOpen) {
  MakeWith(3);
  auto first = ContributeAndWait("w1", 1, 2);
  auto second = ContributeAndWait("w2", 1, 4);
  config_.rounds.quorum = 4;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  EXPECT_FALSE(first->done.HasBeenNotified());
  config_.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  EXPECT_EQ(module_->Current()->step, 1u);
  EXPECT_TRUE(first->done.HasBeenNotified());
  EXPECT_TRUE(second->done.HasBeenNotified());
  EXPECT_THAT(Values("a"), ElementsAre(-3, -3, -3, -3));
}

TEST_F(RoundTest, AContributionThatIsNotFiniteSkipsTheRoundForAll) {
  MakeWith(2);
  ASSERT_TRUE(Contribute("w1", 1, std::numeric_limits<float>::infinity()).ok());
  absl::StatusOr<StepAnswer> answer = Contribute("w2", 1, 1);
  ASSERT_TRUE(answer.ok());
  EXPECT_EQ(answer->outcome, StepOutcome::kSkippedNonfinite);
  EXPECT_THAT(answer->nonfinite, ElementsAre("a"));
  EXPECT_EQ(Apply(*module_, As("w1", 1))->outcome, StepOutcome::kSkippedNonfinite);
  EXPECT_EQ(module_->Current()->step, 0u);
  EXPECT_THAT(Values("a"), ElementsAre(0, 0, 0, 0));
  ASSERT_TRUE(Contribute("w1", 2, 1).ok());
  EXPECT_EQ(Contribute("w2", 2, 1)->outcome, StepOutcome::kApplied);
}

TEST_F(RoundTest, AWorkerWhoseGradientIsKnownNotToBeFiniteIsNamed) {
  MakeWith(2);
  StepRequest request = As("w1", 1);
  request.gradients = *Stage(*module_, {{"a", std::numeric_limits<float>::infinity()}});
  request.gradients->entries[0].norm = TensorNorm{0, false};  // as computed when it arrived
  ASSERT_TRUE(Apply(*module_, std::move(request)).ok());
  const absl::StatusOr<StepAnswer> answer = Contribute("w2", 1, 1);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->outcome, StepOutcome::kSkippedNonfinite);
  EXPECT_THAT(answer->nonfinite_workers, ElementsAre("w1"));
}

TEST_F(RoundTest, AContributionFromBeforeTheLastStepIsLate) {
  MakeWith(2);
  config_.max_staleness = 0;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  const Version base = module_->Current()->version;
  const auto from_base = [&](const std::string& worker, uint64_t sequence) {
    StepRequest request = As(worker, sequence);
    request.base = base;
    return Push(*module_, {{"a", 1}}, std::move(request));
  };
  ASSERT_TRUE(from_base("w1", 1).ok());
  ASSERT_TRUE(from_base("w2", 1).ok());
  EXPECT_THAT(ReasonOf(from_base("w3", 1)), Eq(Reason::kStaleBase));
  EXPECT_EQ(module_->training_info().round.contributions, 0u);
}

TEST_F(RoundTest, OverridesOfARoundAreOne) {
  MakeWith(3);
  StepRequest request = As("w1", 1);
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.lr = 2;
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
  request = As("w2", 1);
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.lr = 3;
  absl::StatusOr<StepAnswer> other = Push(*module_, {{"a", 1}}, std::move(request));
  EXPECT_THAT(ReasonOf(other), Eq(Reason::kOverrideConflict));
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("w1"));
  ASSERT_TRUE(Contribute("w2", 1, 1).ok());
  ASSERT_TRUE(Contribute("w3", 1, 1).ok());
  EXPECT_THAT(Values("a"), ElementsAre(-2, -2, -2, -2));
}

TEST_F(RoundTest, WorkersAndNothingElseMakeARound) {
  MakeWith(2);
  absl::StatusOr<StepAnswer> nameless = Push(*module_, {{"a", 1}});
  EXPECT_THAT(ReasonOf(nameless), Eq(Reason::kInvalidField));
  EXPECT_THAT(std::string(nameless.status().message()), HasSubstr("distinct workers"));
}

TEST_F(RoundTest, WhatIsInNoGroupAnyMoreIsLeftOut) {
  MakeWith(2);
  ASSERT_TRUE(Push(*module_, {{"a", 1}, {"b", 1}}, As("w1", 1)).ok());
  config_.no_default_group = true;
  config_.groups.resize(1);
  config_.groups[0].selection.names = {"a"};
  ASSERT_TRUE(Configure(*module_, config_).ok());
  EXPECT_EQ(module_->training_info().round.staged_bytes, 16u);
  ASSERT_EQ(Contribute("w2", 1, 1)->outcome, StepOutcome::kApplied);
  EXPECT_THAT(Values("a"), ElementsAre(-1, -1, -1, -1));
  EXPECT_THAT(Values("b"), ElementsAre(0, 0));
}

TEST_F(RoundTest, AFreezeLeavesOutWhatIsFrozenByThen) {
  MakeWith(2);
  ASSERT_TRUE(Push(*module_, {{"a", 1}, {"b", 1}}, As("w1", 1)).ok());
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"b"}), false).ok());
  ASSERT_TRUE(Contribute("w2", 1, 1).ok());
  EXPECT_EQ(module_->Current()->step, 1u);
  EXPECT_THAT(Values("a"), ElementsAre(-1, -1, -1, -1));
  EXPECT_THAT(Values("b"), ElementsAre(0, 0));
}

TEST_F(RoundTest, ConfigurationThatDoesNotFitItGivesARoundUp) {
  MakeWith(2);
  StepRequest request = As("w1", 1);
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.momentum = 0.9;  // AdamW has none
  request.gradients = *Stage(*module_, {{"a", 1}});
  auto waiting = Wait(std::move(request));
  config_ = AdamW();
  config_.rounds.quorum = 1;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  ASSERT_TRUE(waiting->done.HasBeenNotified());
  EXPECT_THAT(ReasonOf(waiting->answer), Eq(Reason::kRoundGivenUp));
  EXPECT_THAT(std::string(waiting->answer.status().message()), HasSubstr("momentum"));
  EXPECT_EQ(module_->Current()->step, 0u);
  EXPECT_TRUE(Contribute("w1", 1, 1).ok()) << "the same sequence, as if it had not been sent";
  EXPECT_EQ(module_->Current()->step, 1u);
}

// With six of ten bytes of the old dtype in a smaller memory no push would ever find room.
TEST_F(RoundTest, ACastThatItDoesNotFitGivesARoundUpAtOnce) {
  module_ = MakeModule({Parameter("a", {256}), Buffer("mean", {256}), Buffer("var", {256})}, 0);
  config_ = Sgd(1);
  config_.rounds.quorum = 6;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  const std::vector<PushTensor> push = {
      {"a", 1}, {"mean", 2, TensorKind::kBuffer}, {"var", 3, TensorKind::kBuffer}};
  StepRequest request = As("w0", 1);
  request.gradients = *StageIn(*module_->push_budget(), *module_, push);
  auto waiting = Wait(std::move(request));
  for (int w = 1; w < 5; ++w) {
    ASSERT_TRUE(PushInRound(push, As(absl::StrCat("w", w), 1)).ok());
  }
  ASSERT_TRUE(Move(*module_, DType::kBF16).ok());
  ASSERT_TRUE(waiting->done.HasBeenNotified());
  EXPECT_THAT(ReasonOf(waiting->answer), Eq(Reason::kRoundGivenUp));
  EXPECT_THAT(std::string(waiting->answer.status().message()), HasSubstr("was cast"));
  EXPECT_EQ(module_->training_info().round.contributions, 0u);
  EXPECT_EQ(module_->push_budget()->used(), 0u);
  EXPECT_EQ(push_budget_->used(), 6u * (1024 + 512 + 512) + 512);
  StepRequest header = As("w1", 1);
  header.payload_digest.clear();
  EXPECT_THAT(ReasonOf(Apply(*module_, std::move(header))), Eq(Reason::kStepNotSeen));
  for (int w = 0; w < 6; ++w) {
    ASSERT_TRUE(PushInRound(push, As(absl::StrCat("w", w), 1)).ok()) << w;
  }
  EXPECT_EQ(module_->Current()->step, 1u);
}

// Of a whole repeat only the digest is kept. Where its round is given up while it comes, it is not
// "send it whole" that its caller can do something with.
TEST_F(RoundTest, AWholeRepeatOfWhatIsGivenUpMeanwhileIsPushedAgain) {
  MakeWith(2);
  StepRequest request = As("w1", 1);
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.momentum = 0.9;  // AdamW has none
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
  StepRequest repeat = As("w1", 1);
  config_ = AdamW();
  config_.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  const absl::StatusOr<StepAnswer> answer = Apply(*module_, std::move(repeat));
  EXPECT_THAT(ReasonOf(answer), Eq(Reason::kRoundGivenUp));
  EXPECT_TRUE(GetRetryAfter(answer.status()).has_value());
  EXPECT_THAT(std::string(answer.status().message()), HasSubstr("push the same sequence again"));
  EXPECT_EQ(Contribute("w1", 1, 1)->outcome, StepOutcome::kPending);
}

TEST_F(RoundTest, ACastThatItFitsLetsARoundGoOn) {
  MakeWith(2);
  ASSERT_TRUE(Contribute("w1", 1, 1).ok());
  ASSERT_TRUE(Move(*module_, DType::kBF16).ok());
  EXPECT_EQ(module_->training_info().round.contributions, 1u);
  EXPECT_EQ(Contribute("w2", 1, 1)->outcome, StepOutcome::kApplied);
}

TEST_F(RoundTest, OverridesForOtherGroupsGiveARoundUp) {
  MakeWith(2);
  config_.groups.resize(1);
  config_.groups[0].name = "first";
  config_.groups[0].selection.names = {"a"};
  ASSERT_TRUE(Configure(*module_, config_).ok());
  StepRequest request = As("w1", 1);
  request.overrides.resize(1);
  request.overrides[0].group = 0;
  request.overrides[0].hyperparameters.lr = 8;
  request.gradients = *Stage(*module_, {{"a", 1}});
  auto waiting = Wait(std::move(request));
  ASSERT_TRUE(Configure(*module_, config_).ok()) << "the same";
  EXPECT_FALSE(waiting->done.HasBeenNotified());
  config_.groups[0].selection.names = {"b"};
  ASSERT_TRUE(Configure(*module_, config_).ok());
  ASSERT_TRUE(waiting->done.HasBeenNotified());
  EXPECT_THAT(ReasonOf(waiting->answer), Eq(Reason::kRoundGivenUp));
}

// Who accumulated before contributing pushes the last push again, not all of them.
TEST_F(RoundTest, AGivenUpRoundGivesBackWhatWasAccumulated) {
  MakeWith(2);
  StepRequest request = As("w1", 1);
  request.accumulate = true;
  const absl::StatusOr<StepAnswer> added = Push(*module_, {{"a", 2}}, std::move(request));
  ASSERT_TRUE(added.ok()) << added.status();
  EXPECT_EQ(added->quorum, 2u);
  request = As("w1", 2);
  request.accumulated = 1;
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.momentum = 0.9;
  ASSERT_EQ(Push(*module_, {{"a", 4}}, std::move(request))->outcome, StepOutcome::kPending);
  config_ = AdamW();
  config_.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module_, config_).ok());  // it has no momentum
  config_ = Sgd(1);
  ASSERT_TRUE(Configure(*module_, config_).ok());
  EXPECT_TRUE(Apply(*module_, As("w1", 1))->replayed);
  request = As("w1", 2);
  request.accumulated = 1;
  ASSERT_TRUE(Push(*module_, {{"a", 4}}, std::move(request)).ok());
  EXPECT_THAT(Values("a"), ElementsAre(-6, -6, -6, -6));
}

TEST_F(RoundTest, WeightsMustBeFiniteInSumWhichIsTheContributorsError) {
  MakeWith(3);
  ASSERT_TRUE(Contribute("w1", 1, 1, 3e38).ok());
  const absl::StatusOr<StepAnswer> refused = Contribute("w2", 1, 1, 1e38);
  EXPECT_THAT(ReasonOf(refused), Eq(Reason::kInvalidField));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("weight is 1e+38; with it"));
  EXPECT_EQ(module_->training_info().round.contributions, 1u);
  EXPECT_EQ(Contribute("w2", 1, 1, 1)->outcome, StepOutcome::kPending);
}

TEST_F(RoundTest, DeletingTheModuleAndDrainingEndWaits) {
  MakeWith(2);
  auto waiting = ContributeAndWait("w1", 1, 1);
  module_->EndWaits(absl::UnavailableError("the server stops"));
  Settle();
  ASSERT_TRUE(waiting->done.HasBeenNotified());
  EXPECT_TRUE(absl::IsUnavailable(waiting->answer.status()));
  auto late = Wait(As("w1", 1));
  ASSERT_TRUE(late->done.HasBeenNotified());
  EXPECT_TRUE(absl::IsUnavailable(late->answer.status()));

  MakeWith(2);
  auto other = ContributeAndWait("w1", 1, 1);
  Delete(*module_);
  ASSERT_TRUE(other->done.HasBeenNotified());
  EXPECT_THAT(ReasonOf(other->answer), Eq(Reason::kModuleDeleted));
  // The first module gives its memory back when the last of its strand's tasks is gone.
  while (push_budget_->used() != 0) std::this_thread::yield();
}

// What a crash would lose must not be remembered as done.
TEST_F(RoundTest, ACheckpointKeepsNoRecordOfWhatWaitsInARound) {
  MakeWith(2);
  ASSERT_TRUE(Contribute("w1", 1, 1).ok());
  ASSERT_TRUE(Contribute("w2", 1, 1).ok());
  ASSERT_TRUE(Contribute("w1", 2, 1).ok());
  const WorkerRecords records = Capture(*module_)->workers;
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records.at("w1").sequence, 1u);
  EXPECT_EQ(records.at("w1").answer.outcome, StepOutcome::kApplied);
}

TEST_F(RoundTest, MemoryOfARoundIsSetAsideWhenItIsConfigured) {
  module_ = MakeModule(
      {Parameter("a", {1024}), Parameter("n", {1024}, DType::kBF16), Buffer("mean", {256})});
  config_ = Sgd();
  config_.rounds.quorum = 3;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  // Per contribution the widest gradients and the buffers; once the new parameters.
  const uint64_t expected = 3 * (4096 + 4096 + 1024) + 4096 + 2048;
  EXPECT_EQ(push_budget_->used(), expected);
  EXPECT_EQ(module_->training_info().round_memory_bytes, expected);
  EXPECT_EQ(module_->push_budget()->limit(), expected);
  config_.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  EXPECT_EQ(push_budget_->used(), expected - 9216);

  config_.rounds.quorum = 4096;
  auto small = std::make_shared<MemoryBudget>(Reason::kPushMemory, "arriving pushes",
                                              "--push_memory", uint64_t{1} << 20);
  std::swap(push_budget_, small);
  module_ = MakeModule({Parameter("a", {1024})});
  absl::StatusOr<VersionRef> refused = Configure(*module_, config_);
  EXPECT_THAT(ReasonOf(refused), Eq(Reason::kPushMemory));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("4096 contributions"));
  EXPECT_EQ(module_->optimizer(), nullptr);
  EXPECT_EQ(push_budget_->used(), 0u);
}

// A call looks for the memory of its push beside the strand: it may be a moment behind.
TEST_F(RoundTest, APushBesideTheEndOfRoundsIsToTryAgain) {
  MakeWith(2);
  const std::shared_ptr<MemoryBudget> seen = module_->push_budget();
  config_.rounds.quorum = 1;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  const absl::Status late = StageIn(*seen, *module_, {{"a", 1}}).status();
  EXPECT_THAT(ReasonOf(late), Eq(Reason::kPushMemory));
  EXPECT_TRUE(GetRetryAfter(late).has_value()) << late;
  EXPECT_TRUE(StageIn(*module_->push_budget(), *module_, {{"a", 1}}).ok());
}

TEST_F(RoundTest, AQuorumOfMoreWorkersThanAreRememberedIsRefused) {
  worker_limits_.max_workers = 2;
  MakeWith(2);
  config_.rounds.quorum = 3;
  const absl::StatusOr<VersionRef> refused = Configure(*module_, config_);
  EXPECT_THAT(ReasonOf(refused), Eq(Reason::kInvalidField));
  EXPECT_THAT(std::string(refused.status().message()),
              testing::AllOf(HasSubstr("rounds.quorum is 3"), HasSubstr("at most 2 workers"),
                             HasSubstr("--max_workers")));
  EXPECT_EQ(GetErrorMetadata(refused.status())["field"], "rounds.quorum");
  EXPECT_EQ(module_->optimizer()->config().rounds.quorum, 2u) << "as before";
}

// Whoever waits in a round is not forgotten, so no place is promised by that.
TEST_F(RoundTest, APlaceIsPromisedOfNoWorkerThatWaitsInARound) {
  worker_limits_ = {2, absl::Minutes(1)};
  MakeWith(2);
  ASSERT_TRUE(Contribute("w1", 1, 1).ok());
  ASSERT_EQ(Contribute("w2", 1, 1)->outcome, StepOutcome::kApplied);
  ASSERT_EQ(Contribute("w1", 2, 1)->outcome, StepOutcome::kPending);
  now_ += absl::Seconds(30);
  ASSERT_TRUE(Contribute("w2", 1, 1)->replayed) << "w2 is the last that was heard of";
  now_ += absl::Seconds(40);
  const absl::Status full = Contribute("w3", 1, 1).status();
  EXPECT_THAT(ReasonOf(full), Eq(Reason::kWorkerLimit));
  EXPECT_EQ(GetRetryAfter(full), absl::Seconds(21)) << "w2 is forgotten then, and w1 is not";
  EXPECT_THAT(std::string(full.message()), HasSubstr("1 of them waits in the open round"));
}

// A round that a change of the quorum ends gives back what it held beyond the new formula.
TEST_F(RoundTest, MemoryOfARoundIsWhatTheFormulaSaysAfterEachChange) {
  module_ = MakeModule({Parameter("a", {1024})});
  const auto configure = [&](uint32_t quorum) {
    config_ = Sgd();
    config_.rounds.quorum = quorum;
    ASSERT_TRUE(Configure(*module_, config_).ok());
  };
  const auto formula = [](uint64_t quorum) { return quorum * 4096 + 4096; };
  uint64_t sequence = 0;
  const auto fill = [&](int workers) {
    ++sequence;
    for (int w = 0; w < workers; ++w) {
      ASSERT_TRUE(PushInRound({{"a", 1}}, As(absl::StrCat("w", w), sequence)).ok());
    }
  };
  configure(8);
  fill(7);
  EXPECT_EQ(push_budget_->used(), formula(8));
  EXPECT_EQ(module_->push_budget()->used(), 7u * 4096);
  configure(3);  // closes it
  EXPECT_EQ(module_->Current()->step, 1u);
  EXPECT_EQ(push_budget_->used(), formula(3));
  configure(8);
  fill(7);
  configure(1);
  EXPECT_EQ(module_->Current()->step, 2u);
  EXPECT_EQ(push_budget_->used(), 0u);
  // What still arrives when the quorum changes gives its part back when it has come.
  configure(8);
  StepRequest late = As("late", 1);
  late.gradients = *StageIn(*module_->push_budget(), *module_, {{"a", 1}});
  configure(1);
  EXPECT_EQ(push_budget_->used(), 4096u);
  ASSERT_EQ(Apply(*module_, std::move(late))->outcome, StepOutcome::kApplied);
  Settle();
  EXPECT_EQ(push_budget_->used(), 0u);
  // Or when it has failed on its way.
  configure(8);
  std::optional<GradientSet> cut = *StageIn(*module_->push_budget(), *module_, {{"a", 1}});
  configure(1);
  cut.reset();
  Tick();
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(RoundTest, ARoundThatFindsNoMemoryRefusesItsLastContributionAndStaysOpen) {
  CpuDevice small(4096 * 5 + 2048, "cpu:9");
  ModuleEnvironment environment = Environment();
  environment.device = &small;
  std::vector<TensorSpec> specs = {Parameter("a", {1024})};
  auto schema = *ModuleSchema::Create(std::move(specs), 1);
  std::vector<StorageRef> storages = {*TensorStorage::Allocate(small, 4096)};
  module_ = std::make_shared<ModuleInstance>("small", environment, schema, std::move(storages),
                                             ModuleMetadata{});
  config_ = AdamW();
  config_.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module_, config_).ok());
  const auto push = [&](const std::string& worker, uint64_t sequence) {
    StepRequest request = As(worker, sequence);
    std::vector<PushedTensor> table(1);
    table[0] = {"a", TensorKind::kGradient, DType::kF32, MakeShape({1024})};
    request.gradients = *StageGradients(module_->Current()->schema, std::move(table), small,
                                        *module_->push_budget(), false, false);
    const absl::Span<uint8_t> bytes = request.gradients->entries[0].storage->MutableHostBytes();
    std::memset(bytes.data(), 0, bytes.size());
    return Apply(*module_, std::move(request));
  };
  // Parameter, two gradients and something else leave no room for two moments.
  RefPtr<TensorStorage> other = *TensorStorage::Allocate(small, 4096);
  ASSERT_EQ(push("w1", 1)->outcome, StepOutcome::kPending);
  EXPECT_THAT(ReasonOf(push("w2", 1)), Eq(Reason::kDeviceMemory));
  EXPECT_EQ(module_->training_info().round.contributions, 1u);
  other = nullptr;
  EXPECT_EQ(push("w2", 1)->outcome, StepOutcome::kApplied);
}

}  // namespace
}  // namespace modelstate
