#include <limits>

#include "absl/strings/str_cat.h"
#include "tests/server/module/module_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::Eq;
using ::testing::HasSubstr;

class AccumulateTest : public ModuleFixture {
 protected:
  void SetUp() override {
    module_ = MakeModule(
        {Parameter("a", {2}), Parameter("n", {2}, DType::kBF16), Buffer("mean", {2})}, 0);
    ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  }

  static StepRequest As(const std::string& worker, uint64_t sequence, bool accumulate) {
    StepRequest request;
    request.worker = worker;
    request.sequence = sequence;
    request.accumulate = accumulate;
    request.payload_digest = absl::StrCat(worker, " ", sequence);
    return request;
  }
  absl::StatusOr<StepAnswer> Add(uint64_t sequence, float value, double grad_scale = 1) {
    StepRequest request = As("w", sequence, true);
    request.grad_scale = grad_scale;
    return Push(*module_, {{"a", value}}, std::move(request));
  }
  absl::StatusOr<StepAnswer> Close(uint64_t sequence, float value) {
    return Push(*module_, {{"a", value}}, As("w", sequence, false));
  }
  std::vector<float> A() {
    const std::vector<uint8_t> bytes = BytesOf(*module_->Current()->storages[0]);
    std::vector<float> values(bytes.size() / 4);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(AccumulateTest, NextStepHasTheSumAsAfterSeveralBackwards) {
  absl::StatusOr<StepAnswer> first = Add(1, 1);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->outcome, StepOutcome::kAccumulated);
  EXPECT_EQ(first->accumulated, 1u);
  EXPECT_EQ(Add(2, 8, 4)->accumulated, 2u) << "divided by its own scale";
  EXPECT_EQ(module_->Current()->step, 0u);
  absl::StatusOr<StepAnswer> last = Close(3, 4);
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ(last->outcome, StepOutcome::kApplied);
  EXPECT_EQ(last->accumulated, 0u);
  EXPECT_THAT(A(), ElementsAre(-7, -7));
  // Nothing is left of it.
  ASSERT_TRUE(Close(4, 1).ok());
  EXPECT_THAT(A(), ElementsAre(-8, -8));
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(AccumulateTest, EachPushCountsOnce) {
  ASSERT_TRUE(Add(1, 1).ok());
  absl::StatusOr<StepAnswer> again = Add(1, 1);
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE(again->replayed);
  EXPECT_EQ(again->accumulated, 1u);
  ASSERT_TRUE(Close(2, 1).ok());
  EXPECT_THAT(A(), ElementsAre(-2, -2));
}

TEST_F(AccumulateTest, SumsOfNarrowGradientsAreF32) {
  // 1 and 2^-9 have no BF16 sum.
  for (int i = 1; i <= 4; ++i) {
    StepRequest request = As("w", static_cast<uint64_t>(i), i < 4);
    ASSERT_TRUE(Push(*module_, {{"n", i == 1 ? 1.0F : 0.001953125F}}, std::move(request)).ok());
  }
  const CapturedState state = *Capture(*module_);
  const std::vector<uint8_t> master =
      BytesOf(*state.optimizer_state.parameters[1].slots[kMasterPlace]);
  float value = 0;
  std::memcpy(&value, master.data(), 4);
  float before = 0;  // of the BF16 elements that MakeModule has filled in
  const uint32_t bits = uint32_t{0x0801} << 16;
  std::memcpy(&before, &bits, 4);
  EXPECT_EQ(value, before - 1.005859375F);
}

TEST_F(AccumulateTest, WorkersHaveTheirOwn) {
  ASSERT_TRUE(Add(1, 1).ok());
  ASSERT_TRUE(Push(*module_, {{"a", 16}}, As("other", 1, false)).ok());
  EXPECT_THAT(A(), ElementsAre(-16, -16));
  ASSERT_TRUE(Close(2, 1).ok());
  EXPECT_THAT(A(), ElementsAre(-18, -18));
}

TEST_F(AccumulateTest, LastBufferValuesWin) {
  ASSERT_TRUE(Push(*module_, {{"a", 1}, {"mean", 3, TensorKind::kBuffer}}, As("w", 1, true)).ok());
  ASSERT_TRUE(Push(*module_, {{"a", 1}, {"mean", 5, TensorKind::kBuffer}}, As("w", 2, true)).ok());
  ASSERT_TRUE(Close(3, 1).ok());
  float value = 0;
  std::memcpy(&value, BytesOf(*module_->Current()->storages[2]).data(), 4);
  EXPECT_EQ(value, 5);
}

TEST_F(AccumulateTest, NeedsAWorker) {
  StepRequest request;
  request.accumulate = true;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"a", 1}}, std::move(request))), Eq(Reason::kInvalidField));
  request = StepRequest();
  request.accumulated = 2;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"a", 1}}, std::move(request))), Eq(Reason::kInvalidField));
}

TEST_F(AccumulateTest, AWorkerThatCountsDifferentlyIsTold) {
  ASSERT_TRUE(Add(1, 1).ok());
  StepRequest request = As("w", 2, false);
  request.accumulated = 2;
  absl::StatusOr<StepAnswer> answer = Push(*module_, {{"a", 1}}, std::move(request));
  EXPECT_THAT(ReasonOf(answer), Eq(Reason::kAccumulationLost));
  EXPECT_THAT(std::string(answer.status().message()), HasSubstr("has 1 of them"));
  request = As("w", 2, false);
  request.accumulated = 1;
  EXPECT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
}

// What is accumulated is in the budget of pushes, the new parameter's place in that of the round.
TEST_F(AccumulateTest, EachBudgetOfARoundGetsItsOwnBack) {
  OptimizerConfig config = Sgd();
  config.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module_, config).ok());
  const uint64_t aside = push_budget_->used();
  for (uint64_t round = 0; round < 3; ++round) {
    for (const char* worker : {"v", "w"}) {
      // Of a BF16 parameter, so that the F32 sum cannot become it.
      StepRequest request = As(worker, 2 * round + 1, true);
      ASSERT_TRUE(Push(*module_, {{"n", 1}}, std::move(request)).ok());
    }
    EXPECT_GT(push_budget_->used(), aside);
    for (const char* worker : {"v", "w"}) {
      StepRequest request = As(worker, 2 * round + 2, false);
      ASSERT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
    }
    EXPECT_EQ(push_budget_->used(), aside);
    EXPECT_EQ(module_->push_budget()->used(), 0u);
  }
  EXPECT_EQ(module_->Current()->step, 3u);
}

// As after the death of the process that had accumulated them, or after STALE_BASE.
TEST_F(AccumulateTest, AWorkerMayBeginAnew) {
  ASSERT_TRUE(Add(1, 1).ok());
  StepRequest request = As("w", 2, true);
  request.accumulated = 0;
  absl::StatusOr<StepAnswer> answer = Push(*module_, {{"a", 2}}, std::move(request));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->accumulated, 1u);
  ASSERT_TRUE(Close(3, 4).ok());
  EXPECT_THAT(A(), ElementsAre(-6, -6));
  ASSERT_TRUE(Add(4, 1).ok());
  request = As("w", 5, false);
  request.accumulated = 0;
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
  EXPECT_THAT(A(), ElementsAre(-7, -7));
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(AccumulateTest, AStepThatIsRefusedLosesNothing) {
  ASSERT_TRUE(Add(1, 1).ok());
  StepRequest request = As("w", 2, false);
  request.overrides.resize(1);
  request.overrides[0].group = 7;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"a", 1}}, std::move(request))),
              Eq(Reason::kOverrideConflict));
  ASSERT_TRUE(Close(2, 1).ok());
  EXPECT_THAT(A(), ElementsAre(-2, -2));
}

TEST_F(AccumulateTest, WhatIsFrozenOrLeavesItsGroupIsDropped) {
  const auto both = [&](uint64_t sequence) {
    return Push(*module_, {{"a", 1}, {"n", 1}}, As("w", sequence, true)).ok();
  };
  ASSERT_TRUE(both(1));
  EXPECT_EQ(push_budget_->used(), 16u);
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"a"}), false).ok());
  EXPECT_EQ(push_budget_->used(), 8u);
  absl::StatusOr<StepAnswer> answer = Push(*module_, {{"n", 1}}, As("w", 2, false));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->updated, 1u);
  EXPECT_THAT(A(), ElementsAre(0, 0));

  // Unfrozen it begins anew, also where the rest has gone on.
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"a"}), true).ok());
  ASSERT_TRUE(both(3));
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"a"}), false).ok());
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"a"}), true).ok());
  ASSERT_TRUE(both(4));
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"n"}), false).ok());
  StepRequest request = As("w", 5, false);
  request.accumulated = 2;
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
  EXPECT_THAT(A(), ElementsAre(-2, -2));

  ASSERT_TRUE(Add(6, 1).ok());
  OptimizerConfig config = Sgd();
  config.no_default_group = true;
  config.groups.resize(1);
  config.groups[0].selection.names = {"n"};
  ASSERT_TRUE(Configure(*module_, config).ok());
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"n"}), true).ok());
  ASSERT_TRUE(Push(*module_, {{"n", 1}}, As("w", 7, false)).ok());
  EXPECT_THAT(A(), ElementsAre(-2, -2));
  EXPECT_EQ(push_budget_->used(), 0u);
}

// The sum is F32 where the parameter is narrower, F64 where it is F64.
TEST_F(AccumulateTest, ACastKeepsSumsWhoseDTypeStaysAndDropsTheOthers) {
  const auto cast = [&](DType dtype) {
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
             module_->Move(nullptr, dtype, std::move(done));
           })
        .ok();
  };
  ASSERT_TRUE(Add(1, 1).ok());
  ASSERT_TRUE(cast(DType::kBF16));
  StepRequest request = As("w", 2, true);
  request.accumulated = 1;
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
  ASSERT_TRUE(cast(DType::kF64));
  EXPECT_EQ(push_budget_->used(), 0u);
  request = As("w", 3, true);
  request.accumulated = 2;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"a", 1}}, std::move(request))),
              Eq(Reason::kAccumulationLost));
  request = As("w", 3, true);
  request.accumulated = 0;
  EXPECT_TRUE(Push(*module_, {{"a", 1}}, std::move(request)).ok());
}

TEST_F(AccumulateTest, OverridesAndWaitBelongToThePushThatSteps) {
  StepRequest request = As("w", 1, true);
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.lr = 2;
  absl::StatusOr<StepAnswer> refused = Push(*module_, {{"a", 1}}, std::move(request));
  EXPECT_THAT(ReasonOf(refused), Eq(Reason::kInvalidField));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("group_overrides"));
  request = As("w", 1, true);
  request.wait = true;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"a", 1}}, std::move(request))), Eq(Reason::kInvalidField));
}

TEST_F(AccumulateTest, ACheckpointKeepsNoRecordOfIt) {
  ASSERT_TRUE(Close(1, 1).ok());
  ASSERT_TRUE(Add(2, 1).ok());
  EXPECT_EQ(Capture(*module_)->workers.at("w").sequence, 1u);
}

TEST_F(AccumulateTest, AnIdleWorkerIsForgottenWithIt) {
  worker_limits_.expiry = absl::Minutes(1);
  SetUp();
  ASSERT_TRUE(Add(1, 1).ok());
  EXPECT_EQ(push_budget_->used(), 8u);
  now_ += absl::Seconds(59);
  module_->Tick();
  Capture(*module_).status().IgnoreError();
  EXPECT_EQ(push_budget_->used(), 8u);
  now_ += absl::Seconds(1);
  module_->Tick();
  Capture(*module_).status().IgnoreError();
  EXPECT_EQ(push_budget_->used(), 0u);
  EXPECT_EQ(module_->training_info().workers, 0u);
}

TEST_F(AccumulateTest, WorkersAreBounded) {
  worker_limits_ = {2, absl::Minutes(1)};
  SetUp();
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, As("w1", 1, false)).ok());
  now_ += absl::Seconds(30);
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, As("w2", 1, false)).ok());
  absl::StatusOr<StepAnswer> third = Push(*module_, {{"a", 1}}, As("w3", 1, false));
  EXPECT_THAT(ReasonOf(third), Eq(Reason::kWorkerLimit));
  EXPECT_EQ(GetRetryAfter(third.status()), absl::Seconds(31));
  now_ += absl::Seconds(29);
  EXPECT_TRUE(Push(*module_, {{"a", 1}}, As("w1", 2, false)).ok()) << "who is known goes on";
  now_ += absl::Seconds(31);
  EXPECT_TRUE(Push(*module_, {{"a", 1}}, As("w3", 1, false)).ok()) << "w2 was silent for a minute";
  EXPECT_EQ(module_->training_info().workers, 2u);
  // Its sequences begin anew: nothing is known of it.
  now_ += absl::Minutes(2);
  EXPECT_FALSE(Push(*module_, {{"a", 1}}, As("w2", 1, false))->replayed);
}

TEST_F(AccumulateTest, AWorkerThatAsksIsNotSilent) {
  worker_limits_.expiry = absl::Minutes(1);
  SetUp();
  ASSERT_TRUE(Push(*module_, {{"a", 1}}, As("w", 1, false)).ok());
  for (int minute = 0; minute < 3; ++minute) {
    now_ += absl::Seconds(40);
    absl::StatusOr<StepAnswer> answer = Apply(*module_, As("w", 1, false));
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_TRUE(answer->replayed);
    now_ += absl::Seconds(40);
    EXPECT_TRUE(Push(*module_, {{"a", 1}}, As("w", 1, false))->replayed);
    module_->Tick();
  }
  EXPECT_EQ(module_->Current()->step, 1u);
}

TEST_F(AccumulateTest, RefusedPushOfANewWorkerTakesNoPlace) {
  worker_limits_ = {1, absl::Minutes(1)};
  SetUp();
  StepRequest request = As("w1", 1, false);
  request.weight = -1;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"a", 1}}, std::move(request))), Eq(Reason::kInvalidField));
  EXPECT_TRUE(Push(*module_, {{"a", 1}}, As("w2", 1, false)).ok());
}

}  // namespace
}  // namespace modelstate
