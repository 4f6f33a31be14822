#include <limits>
#include <random>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "server/rules/rule_info.h"
#include "tests/common/allocation_meter.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

using ::testing::Eq;
using ::testing::HasSubstr;

class SaveLoadTest : public CheckpointFixture {
 protected:
  std::vector<TensorSpec> Specs(DType dtype = DType::kF32) {
    TensorSpec tied = Parameter("head.weight", {6, 50}, dtype);
    tied.alias_of = "embed.weight";
    TensorSpec frozen = Parameter("stem.weight", {3, 5}, dtype);
    frozen.requires_grad = false;
    TensorSpec scratch = Buffer("scratch", {4});
    scratch.persistent = false;
    return {Parameter("embed.weight", {6, 50}, dtype),
            frozen,
            Buffer("bn.running_mean", {7}),
            Buffer("bn.num_batches_tracked", {}, DType::kI64),
            scratch,
            Parameter("bn.weight", {7}, dtype),
            Parameter("empty", {0, 3}, dtype),
            Parameter("scale", {}, dtype),
            tied};
  }

  // A push whose values depend on `step` alone.
  absl::StatusOr<StepAnswer> Train(ModuleInstance& module, uint64_t step) {
    std::mt19937 random(static_cast<uint32_t>(step));
    const auto value = [&random] { return static_cast<float>(random() % 1000) / 500 - 1; };
    StepRequest request;
    request.worker = "trainer";
    request.sequence = step;
    request.payload_digest = absl::StrCat("digest", step);
    return Push(module,
                {{"embed.weight", value()},
                 {"bn.weight", value()},
                 {"empty", value()},
                 {"scale", value()},
                 {"bn.running_mean", value(), TensorKind::kBuffer}},
                std::move(request));
  }

  // Of each parameter of `resumed`, by its name.
  void ExpectSameOptimizerState(ModuleInstance& module, ModuleInstance& resumed) {
    const CapturedState a = *Capture(module);
    const CapturedState b = *Capture(resumed);
    for (uint32_t i = 0; i < b.snapshot->schema->size(); ++i) {
      const std::string& name = b.snapshot->schema->spec(i).name;
      SCOPED_TRACE(name);
      const ParameterState& x = a.optimizer_state.parameters[*a.snapshot->schema->Find(name)];
      const ParameterState& y = b.optimizer_state.parameters[i];
      EXPECT_EQ(x.step, y.step);
      EXPECT_EQ(x.product, y.product);
      for (size_t slot = 0; slot < kMaxSlots; ++slot) {
        ASSERT_EQ(static_cast<bool>(x.slots[slot]), static_cast<bool>(y.slots[slot]));
        if (x.slots[slot]) {
          EXPECT_EQ(Bytes(x.slots[slot]), Bytes(y.slots[slot]));
        }
      }
    }
  }

  void ExpectSameTraining(DType dtype, OptimizerConfig config) {
    auto module = MakeModule(Specs(dtype));
    ASSERT_TRUE(Configure(*module, config).ok());
    for (uint64_t step = 1; step <= 5; ++step) ASSERT_TRUE(Train(*module, step).ok());
    const auto saved = Save(*module, "step5");
    ASSERT_TRUE(saved.ok()) << saved.status();
    EXPECT_EQ(saved->step, 5u);

    auto resumed = MakeModule({});
    const auto loaded = Load(*resumed, "step5");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ((*loaded)->step, 5u);
    EXPECT_EQ(resumed->optimizer_state_bytes(), module->optimizer_state_bytes());
    for (uint64_t step = 6; step <= 10; ++step) {
      ASSERT_TRUE(Train(*module, step).ok());
      const auto answer = Train(*resumed, step);
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_EQ(answer->step, step);
      EXPECT_EQ(answer->updated, 4u);
    }
    auto expected = Contents(*module->Current());
    expected.erase("scratch");  // not persistent: a state_dict does not hold it
    EXPECT_EQ(Contents(*resumed->Current()), expected);
    ExpectSameOptimizerState(*module, *resumed);
    // Again over itself, so that the next case may use the path.
    ASSERT_TRUE(store_->Delete("step5").ok());
  }
};

TEST_F(SaveLoadTest, TrainingGoesOnBitEqualAfterSaveAndLoad) {
  OptimizerConfig groups = AdamW(0.0123456789012345678);
  groups.groups.push_back({"no_decay", Names({"bn.weight"}), {}});
  groups.groups[0].hyperparameters.weight_decay = 0;
  groups.groups[0].hyperparameters.lr = 1.0 / 3;
  groups.max_grad_norm = 0.1 + 0.2;
  groups.max_staleness = std::numeric_limits<uint64_t>::max();
  ExpectSameTraining(DType::kF32, groups);
  ExpectSameTraining(DType::kF32, Sgd(0.1, 0.9));
  ExpectSameTraining(DType::kF32, Sgd(0.1));
}

class EveryAlgorithmAndDType : public SaveLoadTest,
                               public ::testing::WithParamInterface<std::tuple<Algorithm, DType>> {
};

TEST_P(EveryAlgorithmAndDType, GoesOnBitEqualAfterSaveAndLoad) {
  const auto [algorithm, dtype] = GetParam();
  OptimizerConfig config;
  config.algorithm = algorithm;
  ExpectSameTraining(dtype, config);
  config.master_weights = false;
  config.no_default_group = true;
  config.groups.push_back({"all", {}, {}});
  config.groups[0].selection.globs = {"*"};
  const RuleInfo& rule = GetRule(algorithm);
  Hyperparameters& h = config.groups[0].hyperparameters;
  // Every slot that the rule may keep.
  if (rule.has(*FindHyperparameter("momentum"))) h.momentum = 0.8;
  if (rule.has(*FindHyperparameter("amsgrad"))) h.amsgrad = true;
  if (rule.has(*FindHyperparameter("centered"))) h.centered = true;
  if (rule.has(*FindHyperparameter("initial_accumulator_value"))) {
    h.initial_accumulator_value = 0.3;
  }
  if (rule.has(*FindHyperparameter("weight_decay"))) h.weight_decay = 0.1;
  config.max_grad_value = 0.7;
  ExpectSameTraining(dtype, config);
}

INSTANTIATE_TEST_SUITE_P(
    SaveLoadTest, EveryAlgorithmAndDType,
    ::testing::Combine(::testing::ValuesIn(AllAlgorithms().begin(), AllAlgorithms().end()),
                       ::testing::Values(DType::kF32, DType::kBF16, DType::kF16, DType::kF64)),
    [](const auto& info) {
      return absl::StrCat(AlgorithmName(std::get<0>(info.param)), "_",
                          DTypeName(std::get<1>(info.param)));
    });

// Saved between a configuration that keeps more and the step that begins it.
TEST_F(SaveLoadTest, StateThatTheNextStepBeginsIsNotMissing) {
  OptimizerConfig before;
  before.algorithm = Algorithm::kAdam;
  OptimizerConfig after = before;
  after.hyperparameters.amsgrad = true;
  auto module = MakeModule(Specs(DType::kBF16));
  ASSERT_TRUE(Configure(*module, before).ok());
  for (uint64_t step = 1; step <= 3; ++step) ASSERT_TRUE(Train(*module, step).ok());
  ASSERT_TRUE(Configure(*module, after).ok());
  ASSERT_TRUE(Save(*module, "between").ok());
  auto resumed = MakeModule({});
  const auto loaded = Load(*resumed, "between");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  for (uint64_t step = 4; step <= 6; ++step) {
    ASSERT_TRUE(Train(*module, step).ok());
    ASSERT_TRUE(Train(*resumed, step).ok());
  }
  auto expected = Contents(*module->Current());
  expected.erase("scratch");
  EXPECT_EQ(Contents(*resumed->Current()), expected);
}

TEST_F(SaveLoadTest, RoundsComeBackAsTheyWereConfigured) {
  OptimizerConfig config = Sgd();
  config.rounds = {3, 2, absl::Milliseconds(1500)};
  auto module = MakeModule(Specs());
  ASSERT_TRUE(Configure(*module, config).ok());
  ASSERT_TRUE(Save(*module, "rounds").ok());
  auto loaded = MakeModule({});
  ASSERT_TRUE(Load(*loaded, "rounds").ok());
  const Rounds rounds = loaded->optimizer()->config().rounds;
  EXPECT_EQ(rounds.quorum, 3u);
  EXPECT_EQ(rounds.min_contributions, 2u);
  EXPECT_EQ(rounds.round_timeout, absl::Milliseconds(1500));
  EXPECT_GT(loaded->training_info().round_memory_bytes, 0u);
  EXPECT_EQ(push_budget_->used(), loaded->training_info().round_memory_bytes +
                                      module->training_info().round_memory_bytes);
}

TEST_F(SaveLoadTest, MasterCopiesOfNarrowParametersAreKept) {
  ExpectSameTraining(DType::kBF16, AdamW(1e-3));
  ExpectSameTraining(DType::kBF16, Sgd(1e-3));
}

TEST_F(SaveLoadTest, SchemaComesBackWithKindsOrderTiesAndFrozen) {
  auto module = MakeModule(Specs());
  ASSERT_TRUE(Save(*module, "a/b/c").ok());
  auto loaded = MakeModule({});
  ASSERT_TRUE(Load(*loaded, "a/b/c").ok());
  const ModuleSchema& expected = *module->Current()->schema;
  const VersionRef version = loaded->Current();
  const ModuleSchema& schema = *version->schema;
  ASSERT_EQ(schema.size(), expected.size() - 1);
  uint32_t i = 0;
  for (const TensorSpec& want : expected.specs()) {
    if (!want.persistent) continue;
    const TensorSpec& got = schema.spec(i++);
    EXPECT_EQ(got.name, want.name);
    EXPECT_EQ(got.kind, want.kind);
    EXPECT_EQ(got.dtype, want.dtype);
    EXPECT_EQ(got.shape, want.shape);
    EXPECT_EQ(got.alias_of, want.alias_of);
    EXPECT_EQ(got.kind == TensorKind::kParameter && got.requires_grad,
              want.kind == TensorKind::kParameter && want.requires_grad);
  }
  EXPECT_EQ(*version->metadata, *module->Current()->metadata);
  EXPECT_EQ(loaded->optimizer(), nullptr);
}

TEST_F(SaveLoadTest, WorkerTableSurvivesWithItsAnswers) {
  auto module = MakeModule(Specs());
  ASSERT_TRUE(Configure(*module, Sgd(0.1)).ok());
  ASSERT_TRUE(Train(*module, 1).ok());
  ASSERT_TRUE(Train(*module, 7).ok());
  StepRequest bad;
  bad.worker = "w\xC3\xBC\"\\\n";
  bad.sequence = 3;
  bad.payload_digest = "x";
  const auto skipped =
      Push(*module, {{"bn.weight", std::numeric_limits<float>::quiet_NaN()}}, std::move(bad));
  ASSERT_EQ(skipped->outcome, StepOutcome::kSkippedNonfinite);
  ASSERT_TRUE(Save(*module, "c").ok());
  const CapturedState before = *Capture(*module);

  auto resumed = MakeModule({});
  ASSERT_TRUE(Load(*resumed, "c").ok());
  const auto repeat = Train(*resumed, 7);
  ASSERT_TRUE(repeat.ok()) << repeat.status();
  EXPECT_TRUE(repeat->replayed);
  EXPECT_EQ(resumed->Current()->step, 2u);
  EXPECT_THAT(ReasonOf(Train(*resumed, 6)), Eq(Reason::kSequenceReused));
  const CapturedState after = *Capture(*resumed);
  ASSERT_EQ(after.workers.size(), before.workers.size());
  for (const auto& [worker, record] : before.workers) {
    const WorkerRecord& got = after.workers.at(worker);
    EXPECT_EQ(got.sequence, record.sequence);
    EXPECT_EQ(got.payload_digest, record.payload_digest);
    EXPECT_EQ(got.answer.outcome, record.answer.outcome);
    EXPECT_EQ(got.answer.version, record.answer.version);
    EXPECT_EQ(got.answer.step, record.answer.step);
    EXPECT_EQ(std::memcmp(&got.answer.grad_norm, &record.answer.grad_norm, 8), 0);
    EXPECT_EQ(std::memcmp(&got.answer.clip_coef, &record.answer.clip_coef, 8), 0);
    EXPECT_EQ(got.answer.nonfinite, record.answer.nonfinite);
    EXPECT_EQ(got.answer.updated, record.answer.updated);
    EXPECT_EQ(got.answer.skipped, record.answer.skipped);
  }
}

TEST_F(SaveLoadTest, OptimizerStateIsAdmittedBeforeItIsAllocatedAndUntilTheCommit) {
  auto module = MakeModule(Specs());
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Train(*module, 1).ok());
  ASSERT_TRUE(Save(*module, "full").ok());
  const uint64_t state_bytes = module->optimizer_state_bytes();
  const auto source = *CheckpointSource::Open(store_->root(), "full", "");
  const auto budget = [](uint64_t limit) {
    return std::make_shared<MemoryBudget>(Reason::kPushMemory, "pushes", "--push_memory", limit);
  };
  static const auto ignore = [](const JobProgress&) {};
  const JobControl control(ignore);
  const ModuleSchema& schema = *module->Current()->schema;
  const uint64_t used = device_.pool()->usage().used_bytes;

  const auto small = budget(state_bytes - 1);
  const auto refused = source->Restore(schema, device_, *small, control, &compute_);
  EXPECT_THAT(ReasonOf(refused), Eq(Reason::kPushMemory));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("weights_only"));
  EXPECT_EQ(small->used(), 0u);
  EXPECT_EQ(device_.pool()->usage().used_bytes, used);

  const auto enough = budget(state_bytes);
  auto restored = source->Restore(schema, device_, *enough, control, &compute_);
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(enough->used(), state_bytes);
  *restored = std::nullopt;
  EXPECT_EQ(enough->used(), 0u);
  ASSERT_TRUE(Load(*module, "full").ok());
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(SaveLoadTest, WeightsOnlySavesAndLoadsNothingElse) {
  auto module = MakeModule(Specs());
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Train(*module, 1).ok());
  ASSERT_TRUE(Save(*module, "full").ok());
  const auto light = Save(*module, "light", {.overwrite = false, .weights_only = true});
  ASSERT_TRUE(light.ok()) << light.status();
  EXPECT_FALSE(light->has_optimizer);
  EXPECT_FALSE(std::filesystem::exists(root_ / "light/optimizer.safetensors"));
  for (const auto& [path, weights_only] : {std::pair("light", false), std::pair("full", true)}) {
    auto loaded = MakeModule({});
    const auto version = Load(*loaded, path, {}, weights_only);
    ASSERT_TRUE(version.ok()) << version.status();
    EXPECT_EQ((*version)->step, 0u);
    EXPECT_EQ(loaded->optimizer(), nullptr);
    EXPECT_EQ(Contents(**version)["embed.weight"], Contents(*module->Current())["embed.weight"]);
  }
}

TEST_F(SaveLoadTest, WeightsOnlyLoadIntoATrainedModuleKeepsMomentsAndDropsMasters) {
  auto module = MakeModule({Parameter("p", {8}, DType::kBF16)});
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Save(*module, "start").ok());
  ASSERT_TRUE(Push(*module, {{"p", 1}}).ok());
  const uint64_t step = module->Current()->step;
  const CapturedState before = *Capture(*module);
  ASSERT_TRUE(before.optimizer_state.parameters[0].slots[0]);
  ASSERT_TRUE(Load(*module, "start", {}, /*weights_only=*/true).ok());
  const CapturedState after = *Capture(*module);
  EXPECT_EQ(module->Current()->step, step);
  EXPECT_FALSE(after.optimizer_state.parameters[0].slots[0]);  // the master copy
  EXPECT_EQ(after.optimizer_state.parameters[0].slots[1],
            before.optimizer_state.parameters[0].slots[1]);
  // The next step begins from the loaded values.
  ASSERT_TRUE(Push(*module, {{"p", 1}}).ok());
  EXPECT_TRUE(Capture(*module)->optimizer_state.parameters[0].slots[0]);
}

TEST_F(SaveLoadTest, LoadCastsToTheModulesDType) {
  auto wide = MakeModule({Parameter("p", {4})}, 1.00390625F);  // 1 + 2^-8: a tie in bf16
  ASSERT_TRUE(Save(*wide, "wide").ok());
  auto narrow = MakeModule({Parameter("p", {4}, DType::kBF16)});
  ASSERT_TRUE(Load(*narrow, "wide").ok());
  EXPECT_EQ(Bytes(narrow->Current()->storages[0]), std::string("\x80\x3f\x80\x3f\x80\x3f\x80\x3f"));
}

// Of several pieces, the last of which is not full.
TEST_F(SaveLoadTest, ACastHoldsNoSecondCopyOfTheTensor) {
  constexpr int64_t kElements = (int64_t{48} << 20) / 4 + 3;
  auto wide = MakeModule({Parameter("p", {kElements})}, 2.5F);
  ASSERT_TRUE(Save(*wide, "wide").ok());
  auto narrow = MakeModule({Parameter("p", {kElements}, DType::kBF16)});
  ResetPeakAllocation();
  ASSERT_TRUE(Load(*narrow, "wide").ok());
  EXPECT_LT(PeakAllocation(), size_t{16} << 20);
  const std::string bytes = Bytes(narrow->Current()->storages[0]);
  ASSERT_EQ(bytes.size(), static_cast<size_t>(kElements) * 2);
  for (size_t i = 0; i < bytes.size(); i += 2) {
    ASSERT_EQ(absl::string_view(bytes).substr(i, 2), absl::string_view("\x20\x40")) << i;
  }
}

TEST_F(SaveLoadTest, FailedLoadChangesNothing) {
  auto saved = MakeModule({Parameter("p", {4})});
  ASSERT_TRUE(Save(*saved, "c").ok());
  auto module = MakeModule({Parameter("p", {4}), Parameter("q", {4})});
  const VersionRef before = module->Current();
  EXPECT_THAT(ReasonOf(Load(*module, "c")), Eq(Reason::kMissingKey));
  EXPECT_EQ(module->Current(), before);
  EXPECT_THAT(ReasonOf(Load(*module, "none")), Eq(Reason::kCheckpointNotFound));
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(SaveLoadTest, LoadThatAFreezeOvertookIsStale) {
  auto module = MakeModule({Parameter("p", {4})});
  ASSERT_TRUE(Save(*module, "c").ok());
  static const auto ignore = [](const JobProgress&) {};
  const JobControl control(ignore);
  const auto source = *CheckpointSource::Open(store_->root(), "c", "");
  const auto commit = [&](std::optional<Version> base, bool freeze) {
    LoadPlan plan =
        *LoadPlan::Create("tiny", module->Current()->schema, source->incoming(), LoadOptions{});
    StagedLoad staged = *source->Stage(std::move(plan), device_, *push_budget_, compute_, control);
    if (freeze) {
      EXPECT_TRUE(SetRequiresGrad(*module, {}, false).ok());
    }
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module->CommitLoad(std::move(staged), base, std::nullopt, std::move(done));
    });
  };
  EXPECT_THAT(ReasonOf(commit(std::nullopt, true)), Eq(Reason::kStaleBase));
  EXPECT_THAT(ReasonOf(commit(Version{7, 2}, false)), Eq(Reason::kIncarnationChanged));
  Version old = module->Current()->version;
  old.number = 1;
  EXPECT_THAT(ReasonOf(commit(old, false)), Eq(Reason::kStaleBase));
  EXPECT_TRUE(commit(module->Current()->version, false).ok());
}

TEST_F(SaveLoadTest, CancelledJobsLeaveNothingBehind) {
  auto module = MakeModule(Specs());
  const CapturedState state = *Capture(*module);
  JobControl* to_cancel = nullptr;
  const auto cancel = [&to_cancel](const JobProgress& progress) {
    if (progress.done_bytes > 0 || progress.phase == absl::string_view("read")) {
      to_cancel->Cancel();
    }
  };
  JobControl save(cancel);
  to_cancel = &save;
  EXPECT_TRUE(absl::IsCancelled(store_->Save(state, "c", {}, save).status()));
  EXPECT_TRUE(std::filesystem::is_empty(root_));

  ASSERT_TRUE(Save(*module, "c").ok());
  const auto source = *CheckpointSource::Open(store_->root(), "c", "");
  LoadPlan plan =
      *LoadPlan::Create("tiny", module->Current()->schema, source->incoming(), LoadOptions{});
  JobControl load(cancel);
  to_cancel = &load;
  EXPECT_TRUE(absl::IsCancelled(
      source->Stage(std::move(plan), device_, *push_budget_, compute_, load).status()));
  EXPECT_EQ(push_budget_->used(), 0u);
}

// Three parameters that nothing but their names tells apart.
TEST_F(SaveLoadTest, OptimizerStateIsLoadedByParameterName) {
  const auto make = [this](const std::vector<std::string>& names) {
    std::vector<TensorSpec> specs;
    for (const std::string& name : names) specs.push_back(Parameter(name, {5}));
    return MakeModule(std::move(specs));
  };
  // "a" in every step, "b" in every second, "c" in every third; each its own gradient.
  const auto train = [this](ModuleInstance& module, uint64_t from) {
    for (uint64_t step = from; step < from + 5; ++step) {
      const float x = static_cast<float>(step);
      std::vector<PushTensor> push = {{"a", x}};
      if (step % 2 == 0) push.push_back({"b", -3 * x});
      if (step % 3 == 0) push.push_back({"c", 0.125F * x});
      ASSERT_TRUE(Push(module, push).ok());
    }
  };
  OptimizerConfig config;
  config.algorithm = Algorithm::kNAdam;  // it has a product beside the step count
  auto module = make({"a", "b", "c"});
  ASSERT_TRUE(Configure(*module, config).ok());
  train(*module, 1);
  ASSERT_TRUE(Save(*module, "c").ok());
  auto resumed = make({"c", "b", "a"});
  const auto loaded = Load(*resumed, "c");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ((*loaded)->schema->spec(0).name, "c") << "the module's own order stays";
  train(*module, 6);
  train(*resumed, 6);
  EXPECT_EQ(Contents(*resumed->Current()), Contents(*module->Current()));
  ExpectSameOptimizerState(*module, *resumed);
}

TEST_F(SaveLoadTest, OptimizerStateOfAnUnknownParameterIsNamed) {
  auto module = MakeModule({Parameter("p", {4}), Parameter("q", {4})});
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"p", 1}, {"q", 1}}).ok());
  ASSERT_TRUE(Save(*module, "c").ok());
  auto smaller = MakeModule({Parameter("p", {4})});
  LoadOptions lenient;
  lenient.strict = false;
  const auto loaded = Load(*smaller, "c", lenient);
  EXPECT_THAT(ReasonOf(loaded), Eq(Reason::kCheckpointCorrupt));
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("\"q\""));
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("weights_only"));
  EXPECT_TRUE(Load(*smaller, "c", lenient, /*weights_only=*/true).ok());
}

TEST_F(SaveLoadTest, PyTorchFileLoadsWithTheKindRules) {
  std::filesystem::copy_file(
      std::filesystem::path(MODELSTATE_SOURCE_DIR) / "tests/data/crepe-tiny.pth",
      root_ / "crepe-tiny.pth");
  auto module = MakeModule({});
  const auto loaded = Load(*module, "crepe-tiny.pth");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ((*loaded)->schema->parameter_count(), 26u);
  EXPECT_EQ((*loaded)->schema->buffer_count(), 18u);
  const auto mean = (*loaded)->schema->Find("conv1_BN.running_mean");
  ASSERT_TRUE(mean.has_value());
  EXPECT_EQ((*loaded)->schema->spec(*mean).kind, TensorKind::kBuffer);

  // And comes back from our own format bit for bit.
  ASSERT_TRUE(Save(*module, "crepe").ok());
  auto again = MakeModule({});
  ASSERT_TRUE(Load(*again, "crepe").ok());
  EXPECT_EQ(Contents(*again->Current()), Contents(**loaded));
  // The tensor file of a checkpoint is a plain one too, with the kinds in it.
  auto plain = MakeModule({});
  ASSERT_TRUE(Load(*plain, "crepe/model.safetensors").ok());
  EXPECT_EQ(plain->Current()->schema->buffer_count(), 18u);
  EXPECT_EQ(Contents(*plain->Current()), Contents(**loaded));
}

TEST_F(SaveLoadTest, HundredThousandTensorsAreSteppedSavedAndLoaded) {
  std::vector<TensorSpec> specs;
  std::vector<PushTensor> push;
  for (int i = 0; i < 100'000; ++i) {
    specs.push_back(i % 5 == 4 ? Buffer(absl::StrCat("layers.", i, ".running_mean"), {i % 3})
                               : Parameter(absl::StrCat("layers.", i, ".weight"), {2, i % 7}));
    if (i % 5 != 4) push.push_back({specs.back().name, 1});
  }
  auto module = MakeModule(std::move(specs));
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  const auto answer = Push(*module, push);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->updated, 80'000u);
  const auto saved = Save(*module, "many");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->tensor_count, 100'000u);
  auto loaded = MakeModule({});
  const auto version = Load(*loaded, "many");
  ASSERT_TRUE(version.ok()) << version.status();
  ASSERT_TRUE(Push(*module, push).ok());
  ASSERT_TRUE(Push(*loaded, push).ok());
  EXPECT_TRUE(Contents(*loaded->Current()) == Contents(*module->Current()));
}

}  // namespace
}  // namespace modelstate
