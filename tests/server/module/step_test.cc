#include <atomic>
#include <limits>
#include <set>
#include <thread>

#include "tests/server/module/module_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

using ::testing::Eq;
using ::testing::HasSubstr;

class StepTest : public ModuleFixture {
 protected:
  StepTest() {
    module_ = MakeModule({Parameter("weight", {8, 16}), Parameter("bias", {8}),
                          Buffer("running_mean", {8}), Buffer("count", {}, DType::kI64)});
  }

  StepRequest Named(const std::string& worker, uint64_t sequence, std::string digest = "d") {
    StepRequest request;
    request.worker = worker;
    request.sequence = sequence;
    request.payload_digest = std::move(digest);
    return request;
  }
  uint64_t number() { return module_->Current()->version.number; }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(StepTest, StepBeforeAnOptimizerIsRefused) {
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}})), Eq(Reason::kNoOptimizer));
  EXPECT_EQ(number(), 1u);
}

TEST_F(StepTest, StepPublishesTheNextVersionAndLeavesBuffersBitForBit) {
  ASSERT_TRUE(Configure(*module_, Sgd(0.5)).ok());
  const VersionRef before = module_->Current();
  const auto answer = Push(*module_, {{"weight", 1}, {"bias", 2}});
  ASSERT_TRUE(answer.ok()) << answer.status();
  const VersionRef after = module_->Current();
  EXPECT_EQ(answer->version, after->version);
  EXPECT_EQ(after->version.number, before->version.number + 1);
  EXPECT_EQ(after->version.incarnation, before->version.incarnation);
  EXPECT_EQ(after->step, 1u);
  EXPECT_EQ(answer->step, 1u);
  EXPECT_EQ(answer->updated, 2u);
  EXPECT_EQ(after->last_mutation, MutationKind::kStep);
  for (const char* buffer : {"running_mean", "count"}) {
    const uint32_t index = *after->schema->Find(buffer);
    EXPECT_EQ(after->storages[index], before->storages[index]) << buffer;
    EXPECT_EQ(after->changed_version[index], 1u) << buffer;
  }
  float first = 0;
  std::memcpy(&first, BytesOf(*after->storages[1]).data(), 4);
  EXPECT_EQ(first, 1.0F - 0.5F * 2.0F);
  EXPECT_EQ(after->changed_version[0], after->version.number);
}

TEST_F(StepTest, PushAssignsBuffersInTheSameVersion) {
  ASSERT_TRUE(Configure(*module_, Sgd(0.5)).ok());
  const std::string count = Contents(*module_->Current())["count"];
  ASSERT_TRUE(Push(*module_, {{"weight", 1}, {"running_mean", 42.5F, TensorKind::kBuffer}}).ok());
  const VersionRef after = module_->Current();
  float mean = 0;
  std::memcpy(&mean, BytesOf(*after->storages[2]).data() + 28, 4);
  EXPECT_EQ(mean, 42.5F);
  EXPECT_EQ(after->changed_version[2], after->version.number);
  EXPECT_EQ(Contents(*after)["count"], count);
}

TEST_F(StepTest, GradientOfABufferChangesNothing) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  const auto before = Contents(*module_->Current());
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}, {"running_mean", 1}})),
              Eq(Reason::kNotAParameter));
  EXPECT_EQ(number(), 2u);
  EXPECT_EQ(Contents(*module_->Current()), before);
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(StepTest, RepeatGetsTheFirstAnswerAndIsNotApplied) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  const auto first = Push(*module_, {{"weight", 1}}, Named("w", 3));
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_FALSE(first->replayed);
  ASSERT_TRUE(Push(*module_, {{"bias", 1}}).ok());  // something else in between

  const auto repeat = Push(*module_, {{"weight", 1}}, Named("w", 3));
  ASSERT_TRUE(repeat.ok()) << repeat.status();
  EXPECT_TRUE(repeat->replayed);
  EXPECT_EQ(repeat->version, first->version);
  EXPECT_EQ(repeat->step, 1u);
  EXPECT_EQ(module_->Current()->step, 2u);

  // Its header alone is enough.
  const auto header = Apply(*module_, Named("w", 3, ""));
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_TRUE(header->replayed);
  EXPECT_EQ(header->version, first->version);
}

TEST_F(StepTest, RepeatIsAnsweredBeforeItsBaseIsLookedAt) {
  OptimizerConfig config = Sgd();
  config.max_staleness = 0;
  ASSERT_TRUE(Configure(*module_, config).ok());
  StepRequest request = Named("w", 1);
  request.base = module_->Current()->version;
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, std::move(request)).ok());
  StepRequest repeat = Named("w", 1);
  repeat.base = Version{1, 1};
  EXPECT_TRUE(Push(*module_, {{"weight", 1}}, std::move(repeat))->replayed);
}

TEST_F(StepTest, LowerSequenceAndOtherPayloadAreRefused) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, Named("w", 7)).ok());
  const auto lower = Push(*module_, {{"weight", 1}}, Named("w", 6));
  EXPECT_THAT(ReasonOf(lower), Eq(Reason::kSequenceReused));
  EXPECT_THAT(std::string(lower.status().message()), HasSubstr("go on with 8"));
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, Named("w", 7, "other"))),
              Eq(Reason::kSequenceReused));
  EXPECT_EQ(module_->Current()->step, 1u);
  EXPECT_TRUE(Push(*module_, {{"weight", 1}}, Named("other", 1)).ok());
  EXPECT_TRUE(Push(*module_, {{"weight", 1}}, Named("w", 100)).ok());
}

TEST_F(StepTest, AfterTheLastSequenceComesAnotherWorker) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, Named("w", UINT64_MAX)).ok());
  const auto lower = Push(*module_, {{"weight", 1}}, Named("w", 1));
  const auto other = Push(*module_, {{"weight", 1}}, Named("w", UINT64_MAX, "other"));
  for (const absl::Status& status : {lower.status(), other.status()}) {
    EXPECT_EQ(GetReason(status), Reason::kSequenceReused);
    EXPECT_THAT(std::string(status.message()), HasSubstr("use another worker name"));
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("go on with")));
  }
}

TEST_F(StepTest, RefusedStepIsNotRecorded) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  StepRequest request = Named("w", 1);
  request.base = Version{12345, 1};
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, std::move(request))),
              Eq(Reason::kIncarnationChanged));
  const auto found = Await<std::optional<StepAnswer>>(
      [&](auto done) { module_->FindStep("w", 1, std::move(done)); });
  ASSERT_TRUE(found.ok());
  EXPECT_FALSE(found->has_value());
  const auto again = Push(*module_, {{"weight", 1}}, Named("w", 1));
  EXPECT_FALSE(again->replayed);
}

TEST_F(StepTest, FindStepKnowsTheLastStepOnly) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, Named("w", 5)).ok());
  const auto find = [&](uint64_t sequence) {
    return Await<std::optional<StepAnswer>>(
        [&](auto done) { module_->FindStep("w", sequence, std::move(done)); });
  };
  EXPECT_TRUE((*find(5))->replayed);
  EXPECT_FALSE(find(6)->has_value());
  EXPECT_THAT(ReasonOf(find(4)), Eq(Reason::kSequenceReused));
}

TEST_F(StepTest, WorkerAndSequenceComeTogether) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, Named("w", 0))), Eq(Reason::kInvalidField));
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, Named("", 1))), Eq(Reason::kInvalidField));
  StepRequest header = Named("w", 1);
  header.payload_digest.clear();
  EXPECT_THAT(ReasonOf(Apply(*module_, std::move(header))), Eq(Reason::kStepNotSeen));
  EXPECT_EQ(module_->Current()->step, 0u);
}

TEST_F(StepTest, ConcurrentDuplicatesAreAppliedExactlyOnce) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  constexpr int kThreads = 8;
  constexpr uint64_t kSteps = 25;
  std::atomic<int> applied{0};
  std::atomic<int> replayed{0};
  std::atomic<int> reused{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (uint64_t sequence = 1; sequence <= kSteps; ++sequence) {
        const auto answer = Push(*module_, {{"bias", -1}}, Named("w", sequence));
        if (answer.ok()) {
          ++(answer->replayed ? replayed : applied);
        } else {
          // Another thread is further on.
          EXPECT_THAT(ReasonOf(answer), Eq(Reason::kSequenceReused));
          ++reused;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(applied, static_cast<int>(kSteps));
  EXPECT_EQ(applied + replayed + reused, static_cast<int>(kThreads * kSteps));
  EXPECT_EQ(module_->Current()->step, kSteps);
  float bias = 0;
  std::memcpy(&bias, BytesOf(*module_->Current()->storages[1]).data(), 4);
  EXPECT_EQ(bias, 1.0F + static_cast<float>(kSteps));
}

TEST_F(StepTest, NonfiniteStepIsSkippedRecordedAndChangesNothing) {
  ASSERT_TRUE(Configure(*module_, Sgd(1, 0.9)).ok());
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
  const auto before = Contents(*module_->Current());
  const auto answer = Push(
      *module_, {{"weight", std::numeric_limits<float>::infinity()}, {"bias", 1}}, Named("w", 1));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->outcome, StepOutcome::kSkippedNonfinite);
  EXPECT_THAT(answer->nonfinite, testing::ElementsAre("weight"));
  EXPECT_EQ(answer->version.number, 3u);
  EXPECT_EQ(number(), 3u);
  EXPECT_EQ(module_->Current()->step, 1u);
  EXPECT_EQ(Contents(*module_->Current()), before);
  EXPECT_TRUE(Apply(*module_, Named("w", 1))->replayed);
}

TEST_F(StepTest, FailedStepPublishesNothing) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  StepRequest request = Named("w", 1);
  request.overrides.push_back({uint32_t{9}, Hyperparameters{}});
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, std::move(request))),
              Eq(Reason::kOverrideConflict));
  StepRequest scale;
  scale.grad_scale = 0;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, std::move(scale))),
              Eq(Reason::kInvalidField));
  StepRequest weight;
  weight.weight = -1;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, std::move(weight))),
              Eq(Reason::kInvalidField));
  EXPECT_EQ(number(), 2u);
}

TEST_F(StepTest, BaseIsStaleByParameterChangesOnly) {
  OptimizerConfig config = Sgd();
  config.max_staleness = 1;
  ASSERT_TRUE(Configure(*module_, config).ok());
  const Version base = module_->Current()->version;
  const auto from_base = [&] {
    StepRequest request;
    request.base = base;
    return request;
  };
  // Neither a freeze nor buffer values make it stale.
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"bias"}), false).ok());
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"bias"}), true).ok());
  ASSERT_TRUE(Push(*module_, {{"running_mean", 1, TensorKind::kBuffer}}).ok());
  ASSERT_TRUE(Push(*module_, {{"running_mean", 2, TensorKind::kBuffer}}).ok());
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, from_base()).ok());  // no change since
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, from_base()).ok());  // one change since
  const auto stale = Push(*module_, {{"weight", 1}}, from_base());
  EXPECT_THAT(ReasonOf(stale), Eq(Reason::kStaleBase));
  EXPECT_THAT(std::string(stale.status().message()), HasSubstr("parameters changed 2 times"));
  EXPECT_EQ(GetErrorMetadata(stale.status())["changes"], "2");
}

TEST_F(StepTest, BaseOfAnotherLifeOrTheFutureIsRefused) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  StepRequest other;
  other.base = module_->Current()->version;
  ++other.base->incarnation;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, std::move(other))),
              Eq(Reason::kIncarnationChanged));
  StepRequest future;
  future.base = module_->Current()->version;
  ++future.base->number;
  EXPECT_THAT(ReasonOf(Push(*module_, {{"weight", 1}}, std::move(future))),
              Eq(Reason::kInvalidField));
  EXPECT_EQ(module_->Current()->step, 0u);
}

TEST_F(StepTest, IncarnationsDiffer) {
  std::set<uint64_t> seen;
  for (int i = 0; i < 16; ++i) {
    seen.insert(MakeModule({Parameter("p", {1})})->Current()->version.incarnation);
  }
  EXPECT_EQ(seen.size(), 16u);
  EXPECT_FALSE(seen.contains(0));
}

TEST_F(StepTest, FreezeBetweenStageAndApplyRefusesTheWholePush) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  StepRequest request;
  request.gradients = *Stage(*module_, {{"weight", 1}, {"bias", 1}});
  const auto frozen = SetRequiresGrad(*module_, Names({"bias"}), false);
  ASSERT_TRUE(frozen.ok());
  EXPECT_EQ(frozen->changed, 1u);
  const auto before = Contents(*module_->Current());
  EXPECT_THAT(ReasonOf(Apply(*module_, std::move(request))), Eq(Reason::kParameterFrozen));
  EXPECT_EQ(Contents(*module_->Current()), before);
  EXPECT_EQ(push_budget_->used(), 0u);

  // A push that the freeze does not concern goes on.
  StepRequest other;
  other.gradients = *Stage(*module_, {{"weight", 1}});
  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"bias"}), true).ok());
  EXPECT_TRUE(Apply(*module_, std::move(other)).ok());
}

TEST_F(StepTest, TiedParameterIsSteppedOnceUnderBothNames) {
  TensorSpec tied = Parameter("head.weight", {4});
  tied.alias_of = "embed.weight";
  auto module = MakeModule({Parameter("embed.weight", {4}), tied});
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  ASSERT_TRUE(Push(*module, {{"head.weight", -1}}).ok());
  const VersionRef now = module->Current();
  EXPECT_EQ(now->storages[0], now->storages[1]);
  EXPECT_EQ(now->changed_version[1], now->version.number);
  float first = 0;
  std::memcpy(&first, BytesOf(*now->storages[1]).data(), 4);
  EXPECT_EQ(first, 1.0F);

  ASSERT_EQ(SetRequiresGrad(*module, Names({"head.weight"}), false)->changed, 1u);
  EXPECT_THAT(ReasonOf(Push(*module, {{"embed.weight", 1}})), Eq(Reason::kParameterFrozen));
}

}  // namespace
}  // namespace modelstate
