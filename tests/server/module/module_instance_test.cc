#include "server/module/module_instance.h"

#include <atomic>

#include "server/module/module_registry.h"
#include "server/module/pin_table.h"
#include "tests/server/module/module_fixture.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::Eq;
using ::testing::HasSubstr;

constexpr uint64_t kParameterBytes = 1024 * 4;

class ModuleInstanceTest : public ModuleFixture {
 protected:
  // Room for two held versions.
  ModuleInstanceTest() : ModuleFixture(uint64_t{1} << 30, 2 * kParameterBytes + 100) {}
  std::shared_ptr<ModuleInstance> MakeOne() { return MakeModule({Parameter("p", {1024})}, 0); }
};

TEST_F(ModuleInstanceTest, HeldVersionIsCountedOnceAndGivenBack) {
  auto module = MakeOne();
  auto first = module->Hold();
  ASSERT_TRUE(first.ok()) << first.status();
  auto second = module->Hold();
  auto third = module->HoldNumber(1);
  ASSERT_TRUE(third.ok());
  EXPECT_EQ(snapshot_budget_->used(), kParameterBytes);
  *first = Snapshot();
  *second = Snapshot();
  EXPECT_EQ(snapshot_budget_->used(), kParameterBytes);
  *third = Snapshot();
  EXPECT_EQ(snapshot_budget_->used(), 0u);
}

TEST_F(ModuleInstanceTest, HoldOverTheBudgetIsRefusedWithARetryHintAndStepsGoOn) {
  auto module = MakeOne();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  std::vector<Snapshot> held;
  for (int i = 0; i < 2; ++i) {
    held.push_back(*module->Hold());
    ASSERT_TRUE(Push(*module, {{"p", -1}}).ok());
  }
  const auto refused = module->Hold();
  EXPECT_THAT(ReasonOf(refused), Eq(Reason::kSnapshotLimit));
  EXPECT_TRUE(GetRetryAfter(refused.status()).has_value());
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("--snapshot_memory"));
  ASSERT_TRUE(Push(*module, {{"p", -1}}).ok());  // readers never starve a step
  held.pop_back();
  EXPECT_TRUE(module->Hold().ok());
}

TEST_F(ModuleInstanceTest, HoldNumberFindsHeldVersionsOnly) {
  auto module = MakeOne();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  Snapshot held = *module->Hold();
  ASSERT_TRUE(Push(*module, {{"p", -1}}).ok());
  const auto again = module->HoldNumber(2);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ((*again)->version.number, 2u);
  EXPECT_EQ(module->HoldNumber(3).value()->version.number, 3u);
  const auto missing = module->HoldNumber(1);
  EXPECT_THAT(ReasonOf(missing), Eq(Reason::kSnapshotNotFound));
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("version 3 is current"));
}

TEST_F(ModuleInstanceTest, DeleteWhileHeldKeepsTheSnapshotAndRefusesTheRest) {
  auto module = MakeOne();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  StepRequest late;
  late.gradients = *Stage(*module, {{"p", 1}});
  Snapshot held = *module->Hold();
  const auto before = Contents(*held);
  std::atomic<int> told{0};
  auto subscription = module->Subscribe([&told] { ++told; });
  Delete(*module);
  EXPECT_EQ(told, 1);
  EXPECT_TRUE(module->deleted());
  EXPECT_THAT(ReasonOf(module->Hold()), Eq(Reason::kModuleDeleted));
  EXPECT_THAT(ReasonOf(module->HoldNumber(2)), Eq(Reason::kModuleDeleted));
  EXPECT_THAT(ReasonOf(Apply(*module, std::move(late))), Eq(Reason::kModuleDeleted));
  EXPECT_THAT(ReasonOf(Configure(*module, Sgd())), Eq(Reason::kModuleDeleted));
  EXPECT_THAT(ReasonOf(SetRequiresGrad(*module, {}, false)), Eq(Reason::kModuleDeleted));
  EXPECT_THAT(ReasonOf(Capture(*module)), Eq(Reason::kModuleDeleted));
  EXPECT_THAT(ReasonOf(Await<std::optional<StepAnswer>>(
                  [&](auto done) { module->FindStep("w", 1, std::move(done)); })),
              Eq(Reason::kModuleDeleted));
  subscription.reset();
  module.reset();
  strands_.join();  // so that no task still refers to the module
  EXPECT_EQ(Contents(*held), before);
  EXPECT_EQ(device_.pool()->usage().used_bytes, kParameterBytes);
  held = Snapshot();
  EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
}

TEST_F(ModuleInstanceTest, WatcherIsConflatedAndQuietAfterItsEnd) {
  auto module = MakeOne();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  std::atomic<int> calls{0};
  auto subscription = module->Subscribe([&calls] { ++calls; });
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Push(*module, {{"p", -1}}).ok());
  // A watcher that looks now sees the newest version at once, not twenty of them.
  EXPECT_EQ(calls, 20);
  EXPECT_EQ(module->Current()->step, 20u);
  subscription.reset();
  ASSERT_TRUE(Push(*module, {{"p", -1}}).ok());
  EXPECT_EQ(calls, 20);
}

TEST_F(ModuleInstanceTest, FreezeNamesParametersOnlyAndPublishesOnlyChanges) {
  auto module = MakeModule({Parameter("a.w", {2}), Parameter("b.w", {2}), Buffer("a.mean", {2})});
  EXPECT_THAT(ReasonOf(SetRequiresGrad(*module, Names({"a.mean"}), false)),
              Eq(Reason::kNotAParameter));
  EXPECT_THAT(ReasonOf(SetRequiresGrad(*module, Names({"nope"}), false)),
              Eq(Reason::kTensorNotFound));
  Selection prefix;
  prefix.prefixes = {"a."};
  auto frozen = SetRequiresGrad(*module, prefix, false);
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  EXPECT_EQ(frozen->changed, 1u);
  EXPECT_EQ(frozen->version.number, 2u);
  EXPECT_FALSE(module->Current()->schema->spec(0).requires_grad);
  EXPECT_TRUE(module->Current()->schema->spec(1).requires_grad);
  EXPECT_EQ(SetRequiresGrad(*module, prefix, false)->version.number, 2u);
  EXPECT_EQ(SetRequiresGrad(*module, {}, true)->changed, 1u);
}

TEST_F(ModuleInstanceTest, EmptyModuleAnswersWithItsOwnReason) {
  auto module = MakeModule({});
  EXPECT_EQ(module->state(), ModuleState::kEmpty);
  EXPECT_THAT(ReasonOf(module->Hold()), Eq(Reason::kModuleEmpty));
  EXPECT_THAT(ReasonOf(Configure(*module, Sgd())), Eq(Reason::kModuleEmpty));
  EXPECT_THAT(ReasonOf(SetRequiresGrad(*module, {}, false)), Eq(Reason::kModuleEmpty));
  EXPECT_THAT(ReasonOf(Capture(*module)), Eq(Reason::kModuleEmpty));
}

TEST_F(ModuleInstanceTest, ConfigureKeepsStateWhereSlotsStayAndResetsElse) {
  auto module = MakeModule({Parameter("p", {4})}, 0);
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"p", 1}}).ok());
  EXPECT_EQ(module->optimizer_state_bytes(), 2u * 16);
  ASSERT_TRUE(Configure(*module, AdamW(0.5)).ok());
  EXPECT_EQ(module->optimizer_state_bytes(), 2u * 16);
  EXPECT_EQ(Capture(*module)->optimizer_state.parameters[0].step, 1u);
  ASSERT_TRUE(Configure(*module, AdamW(0.5), /*reset=*/true).ok());
  EXPECT_EQ(module->optimizer_state_bytes(), 0u);
  ASSERT_TRUE(Push(*module, {{"p", 1}}).ok());
  ASSERT_TRUE(Configure(*module, Sgd(1, 0.9)).ok());
  EXPECT_EQ(module->optimizer_state_bytes(), 0u);
  EXPECT_EQ(Capture(*module)->optimizer_state.parameters[0].step, 0u);
}

TEST_F(ModuleInstanceTest, StepWhileCapturedWritesFreshMoments) {
  auto module = MakeModule({Parameter("p", {4})}, 0);
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"p", 1}}).ok());
  CapturedState captured = *Capture(*module);
  const std::string before = Bytes(captured.optimizer_state.parameters[0].slots[1]);
  ASSERT_TRUE(Push(*module, {{"p", 3}}).ok());
  EXPECT_EQ(Bytes(captured.optimizer_state.parameters[0].slots[1]), before);
  EXPECT_NE(Bytes(Capture(*module)->optimizer_state.parameters[0].slots[1]), before);
}

TEST_F(ModuleInstanceTest, PinLivesForItsLease) {
  auto module = MakeOne();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  PinTable pins([this] { return now_; }, absl::Minutes(10));
  auto pin = pins.Create(module, absl::Seconds(60));
  ASSERT_TRUE(pin.ok()) << pin.status();
  EXPECT_EQ(pin->id.size(), 32u);
  const std::string id = pin->id;
  *pin = PinTable::Pin();
  ASSERT_TRUE(Push(*module, {{"p", -1}}).ok());

  now_ += absl::Seconds(59);
  ASSERT_TRUE(pins.Find(id).ok());
  EXPECT_EQ(pins.Find(id)->snapshot->step, 0u);
  // A shorter renewal never ends it earlier.
  const absl::Time end = pins.Find(id)->expire_time;
  EXPECT_EQ(pins.Renew(id, absl::Milliseconds(1))->expire_time, end);
  EXPECT_EQ(pins.Renew(id, absl::Seconds(30))->expire_time, now_ + absl::Seconds(30));
  now_ += absl::Seconds(29);
  EXPECT_EQ(snapshot_budget_->used(), kParameterBytes);
  now_ += absl::Seconds(1);
  pins.ExpireDue();
  EXPECT_EQ(snapshot_budget_->used(), 0u);
  EXPECT_THAT(ReasonOf(pins.Find(id)), Eq(Reason::kSnapshotNotFound));
  EXPECT_THAT(ReasonOf(pins.Renew(id, absl::Seconds(1))), Eq(Reason::kSnapshotNotFound));
  EXPECT_THAT(ReasonOf(pins.Release(id)), Eq(Reason::kSnapshotNotFound));
}

TEST_F(ModuleInstanceTest, PinEndsByReleaseOrWithItsModule) {
  auto module = MakeOne();
  auto other = MakeOne();
  PinTable pins([this] { return now_; }, absl::Minutes(10));
  for (absl::Duration lease : {absl::ZeroDuration(), -absl::Seconds(1), absl::Minutes(11)}) {
    EXPECT_THAT(ReasonOf(pins.Create(module, lease)), Eq(Reason::kInvalidField));
  }
  const std::string released = pins.Create(module, absl::Seconds(60))->id;
  const std::string gone = pins.Create(module, absl::Seconds(60))->id;
  const std::string kept = pins.Create(other, absl::Seconds(60))->id;
  EXPECT_TRUE(pins.Release(released).ok());
  EXPECT_FALSE(pins.Find(released).ok());
  pins.ReleaseModule(*module);
  EXPECT_FALSE(pins.Find(gone).ok());
  EXPECT_TRUE(pins.Find(kept).ok());
  EXPECT_EQ(snapshot_budget_->used(), kParameterBytes);
}

TEST_F(ModuleInstanceTest, RegistryNamesFindsAndDeletes) {
  ModuleRegistry registry(Environment());
  std::vector<std::string> events;
  registry.SetListener([&events](const std::string& name, bool ready) {
    events.push_back(name + (ready ? "+" : "-"));
  });
  const auto make = [&](const std::string& name) {
    return registry.Create(name, *ModuleSchema::Create({}, 1), {}, {});
  };
  for (const char* bad : {"", "-a", "/a", "a b", "a\n", "\xC3\xA9", "a//b", "a/", "a/../b", "a/./b",
                          "latest", "a/latest", "a/manifest.json", "a.tmp-0123456789abcdef",
                          "a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a"}) {
    EXPECT_THAT(ReasonOf(make(bad)), Eq(Reason::kInvalidField)) << bad;
  }
  EXPECT_FALSE(make(std::string(129, 'a')).ok());
  EXPECT_TRUE(ModuleRegistry::ValidateName(std::string(128, 'a')).ok());
  auto b = *make("b");
  ASSERT_TRUE(make("a/x-1_2.3").ok());
  EXPECT_TRUE(ModuleRegistry::ValidateName("latest-1/a..b").ok());
  ASSERT_TRUE(make("c").ok());
  EXPECT_THAT(ReasonOf(make("b")), Eq(Reason::kModuleExists));
  EXPECT_EQ(*registry.Find("b"), b);
  const auto missing = registry.Find("d");
  EXPECT_THAT(ReasonOf(missing), Eq(Reason::kModuleNotFound));
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("\"b\""));
  std::vector<std::string> names;
  for (const auto& module : registry.List("a/x-1_2.3", 1)) names.push_back(module->name());
  EXPECT_THAT(names, ElementsAre("b"));
  EXPECT_EQ(registry.size(), 3u);

  // Ready by a load.
  TensorSpec spec = Parameter("p", {2});
  StagedLoad load;
  load.plan.base = b->Current()->schema;
  load.plan.schema = *ModuleSchema::Create({spec}, 2);
  load.plan.items.push_back({0, 0, DType::kF32, DType::kF32, 8});
  load.storages.push_back(*TensorStorage::FromHost(device_, std::vector<uint8_t>(8, 1)));
  ASSERT_TRUE(Await<VersionRef>([&](auto done) {
                b->CommitLoad(std::move(load), std::nullopt, std::nullopt, std::move(done));
              }).ok());
  EXPECT_EQ(b->state(), ModuleState::kReady);

  absl::Notification deleted;
  ASSERT_TRUE(registry.Delete("b", [&deleted](const ModuleInstance&) { deleted.Notify(); }).ok());
  EXPECT_FALSE(registry.Find("b").ok());
  deleted.WaitForNotification();
  EXPECT_TRUE(b->deleted());
  EXPECT_THAT(ReasonOf(registry.Delete("b", [](const ModuleInstance&) {})),
              Eq(Reason::kModuleNotFound));
  EXPECT_THAT(events, ElementsAre("b-", "a/x-1_2.3-", "c-", "b+", "b-"));
}

TEST(ChangeRecordTest, CountsExactlyWhileItRemembers) {
  ChangeRecord record(3);
  EXPECT_EQ(record.CountAfter(0), 0u);
  for (uint64_t number : {1, 2, 3, 7, 8, 12}) record.Add(number);
  EXPECT_EQ(record.total(), 6u);
  const uint64_t expected[] = {6, 5, 4, 3, 3, 3, 3, 2, 1, 1, 1, 1, 0, 0};
  for (uint64_t base = 0; base < 14; ++base) {
    EXPECT_EQ(record.CountAfter(base), expected[base]) << base;
  }
  record.Add(20);  // forgets the run 1..3
  EXPECT_EQ(record.CountAfter(2), std::nullopt);
  EXPECT_EQ(record.CountAfter(3), 4u);
  EXPECT_EQ(record.CountAfter(12), 1u);
}

}  // namespace
}  // namespace modelstate
