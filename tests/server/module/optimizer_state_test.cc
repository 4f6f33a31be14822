// Optimizer state that is held for readers, and that is replaced.
#include "server/module/pin_table.h"
#include "tests/server/module/module_fixture.h"

namespace modelstate {
namespace {

class OptimizerStateTest : public ModuleFixture {
 protected:
  absl::StatusOr<CapturedState> HoldWith(ModuleInstance& module, Selection selection = {}) {
    return Await<CapturedState>([&](ModuleInstance::Done<CapturedState> done) {
      module.HoldWithOptimizer(std::move(selection), std::move(done));
    });
  }
  absl::StatusOr<VersionRef> Replace(ModuleInstance& module, StagedOptimizerState load,
                                     std::optional<Version> base = std::nullopt) {
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module.ReplaceOptimizerState(std::move(load), base, std::move(done));
    });
  }
  // State for SGD with momentum of the first parameter, of 4 elements.
  StagedOptimizerState Staged(ModuleInstance& module) {
    StagedOptimizerState staged;
    staged.schema = module.Current()->schema;
    staged.optimizer = module.optimizer();
    staged.state.parameters.resize(staged.schema->size());
    ParameterState& parameter = staged.state.parameters[0];
    parameter.step = 5;
    const float elements[] = {1, 2, 3, 4};
    parameter.slots[kMasterPlace + 1] = *TensorStorage::FromHost(
        device_, {reinterpret_cast<const uint8_t*>(elements), sizeof(elements)});
    return staged;
  }
  std::shared_ptr<ModuleInstance> MakeTrained() {
    auto module = MakeModule({Parameter("a", {4}), Parameter("b", {4}), Buffer("mean", {4})});
    EXPECT_TRUE(Configure(*module, Sgd(1, 0.9)).ok());
    EXPECT_TRUE(Push(*module, {{"a", 1}, {"b", 2}}).ok());
    return module;
  }
  static std::string Momentum(const OptimizerState& state, uint32_t index) {
    return Bytes(state.parameters[index].slots[kMasterPlace + 1]);
  }
};

TEST_F(OptimizerStateTest, HoldBelongsToItsVersionWhileStepsGoOn) {
  auto module = MakeTrained();
  const uint64_t number = module->Current()->version.number;
  absl::StatusOr<CapturedState> held = HoldWith(*module, Names({"b"}));
  ASSERT_TRUE(held.ok()) << held.status();
  EXPECT_EQ(held->snapshot->version.number, number);
  EXPECT_TRUE(held->workers.empty());
  EXPECT_EQ(held->optimizer_state.parameters[0].step, 0u) << "not selected";
  EXPECT_EQ(held->optimizer_state.parameters[1].step, 1u);
  EXPECT_EQ(snapshot_budget_->used(), 3 * 16u + 16u);
  const std::string before = Momentum(held->optimizer_state, 1);
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 2}}).ok());
  EXPECT_EQ(Momentum(held->optimizer_state, 1), before);
  EXPECT_NE(Momentum(Capture(*module)->optimizer_state, 1), before);
  held = absl::CancelledError();
  EXPECT_EQ(snapshot_budget_->used(), 0u);

  EXPECT_EQ(ReasonOf(HoldWith(*module, Names({"c"}))), Reason::kTensorNotFound);
  EXPECT_EQ(ReasonOf(HoldWith(*MakeModule({}))), Reason::kModuleEmpty);
  EXPECT_EQ(ReasonOf(HoldWith(*MakeModule({Parameter("a", {4})}))), Reason::kNoOptimizer);
  Delete(*module);
  EXPECT_EQ(ReasonOf(HoldWith(*module)), Reason::kModuleDeleted);
}

TEST_F(OptimizerStateTest, PinsKeepWhatWasHeldForThem) {
  auto module = MakeTrained();
  PinTable pins([this] { return now_; }, absl::Minutes(1));
  absl::StatusOr<CapturedState> held = HoldWith(*module);
  const auto pin =
      pins.Create(module, absl::Seconds(10), *std::exchange(held, absl::CancelledError()));
  ASSERT_TRUE(pin.ok()) << pin.status();
  const std::string id = pin->id;
  ASSERT_TRUE(Push(*module, {{"a", 1}}).ok());
  {
    const PinTable::Pin found = *pins.Find(id);
    ASSERT_NE(found.optimizer, nullptr);
    EXPECT_EQ(found.optimizer->snapshot->version, found.snapshot->version);
    EXPECT_EQ(found.optimizer->optimizer_state.parameters[0].step, 1u);
  }
  EXPECT_EQ(pins.Create(module, absl::Seconds(10))->optimizer, nullptr);
  held = HoldWith(*module);
  Delete(*module);
  pins.ReleaseModule(*module);
  EXPECT_EQ(ReasonOf(pins.Create(module, absl::Seconds(10), *std::move(held))),
            Reason::kModuleDeleted);
  EXPECT_EQ(pins.size(), 0u);
}

TEST_F(OptimizerStateTest, ReplacesAllOfItInOneVersionThatChangesNoParameter) {
  auto module = MakeTrained();
  const VersionRef before = module->Current();
  StagedOptimizerState staged = Staged(*module);
  staged.step = 70;
  const auto version = Replace(*module, std::move(staged), before->version);
  ASSERT_TRUE(version.ok()) << version.status();
  EXPECT_EQ((*version)->version.number, before->version.number + 1);
  EXPECT_EQ((*version)->step, 70u);
  EXPECT_EQ((*version)->last_mutation, MutationKind::kLoad);
  EXPECT_EQ((*version)->parameter_changes, before->parameter_changes) << "no push becomes stale";
  EXPECT_EQ(Contents(**version), Contents(*before));
  EXPECT_EQ(module->optimizer_state_bytes(), 16u);
  {
    const CapturedState state = *Capture(*module);
    EXPECT_EQ(state.optimizer_state.parameters[0].step, 5u);
    EXPECT_EQ(state.optimizer_state.parameters[1].step, 0u);
  }
  ASSERT_TRUE(Push(*module, {{"a", 1}}).ok());
  const CapturedState state = *Capture(*module);
  EXPECT_EQ(state.optimizer_state.parameters[0].step, 6u);
  const float momentum = 0.9F * 3 + 1;
  float third = 0;
  std::memcpy(&third, Momentum(state.optimizer_state, 0).data() + 8, 4);
  EXPECT_FLOAT_EQ(third, momentum);
}

TEST_F(OptimizerStateTest, WhatTheModuleOvertookIsStale) {
  auto module = MakeTrained();
  StagedOptimizerState staged = Staged(*module);
  const Version base = module->Current()->version;
  ASSERT_TRUE(Push(*module, {{"a", 1}}).ok());
  EXPECT_EQ(ReasonOf(Replace(*module, Staged(*module), base)), Reason::kStaleBase);
  Version other = module->Current()->version;
  ++other.incarnation;
  EXPECT_EQ(ReasonOf(Replace(*module, Staged(*module), other)), Reason::kIncarnationChanged);

  ASSERT_TRUE(Configure(*module, Sgd(2, 0.9)).ok());
  EXPECT_EQ(ReasonOf(Replace(*module, std::move(staged))), Reason::kStaleBase) << "configured";
  staged = Staged(*module);
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  staged.configures = true;
  EXPECT_TRUE(Replace(*module, std::move(staged)).ok()) << "it brings its own";
  EXPECT_EQ(module->optimizer()->algorithm(), Algorithm::kSgd);

  staged = Staged(*module);
  ASSERT_TRUE(SetRequiresGrad(*module, Names({"b"}), false).ok());
  EXPECT_EQ(ReasonOf(Replace(*module, std::move(staged))), Reason::kStaleBase) << "another schema";
  CpuDevice elsewhere(uint64_t{1} << 30);
  staged = Staged(*module);
  staged.state.parameters[0].slots[kMasterPlace + 1] = *TensorStorage::Allocate(elsewhere, 16);
  EXPECT_EQ(ReasonOf(Replace(*module, std::move(staged))), Reason::kStaleBase) << "another device";
  Delete(*module);
  EXPECT_EQ(ReasonOf(Replace(*module, Staged(*module))), Reason::kModuleDeleted);
}

TEST_F(OptimizerStateTest, AnOpenRoundGoesOnWithTheNewState) {
  auto module = MakeModule({Parameter("a", {4}), Parameter("b", {4})}, 0);
  OptimizerConfig config = Sgd(1, 0.5);
  config.rounds.quorum = 2;
  ASSERT_TRUE(Configure(*module, config).ok());
  const auto push = [&](const std::string& worker) {
    StepRequest request;
    request.worker = worker;
    request.sequence = 1;
    request.payload_digest = worker;
    return Push(*module, {{"a", 1}}, std::move(request));
  };
  ASSERT_TRUE(push("one").ok());
  ASSERT_TRUE(Replace(*module, Staged(*module)).ok());
  EXPECT_EQ(module->training_info().round.contributions, 1u);
  const auto closed = push("two");
  ASSERT_TRUE(closed.ok()) << closed.status();
  EXPECT_EQ(closed->outcome, StepOutcome::kApplied);
  float first = 0;
  std::memcpy(&first, Contents(*module->Current())["a"].data(), 4);
  EXPECT_FLOAT_EQ(first, -(0.5F * 1 + 1));
}

}  // namespace
}  // namespace modelstate
