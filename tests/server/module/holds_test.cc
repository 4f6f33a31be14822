// What held versions cost, and that they never take a step's memory.
#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "server/module/pin_table.h"
#include "tests/server/module/module_fixture.h"

namespace modelstate {
namespace {

using ::testing::Eq;
using ::testing::HasSubstr;

constexpr uint64_t kBytes = 1024 * 4;  // of each tensor here

class HoldsTest : public ModuleFixture {
 protected:
  using ModuleFixture::ModuleFixture;

  // Two parameters, one frozen, and buffers.
  std::shared_ptr<ModuleInstance> MakeMixed() {
    TensorSpec tied = Parameter("tied", {1024});
    tied.alias_of = "a";
    TensorSpec frozen = Parameter("frozen", {1024});
    frozen.requires_grad = false;
    TensorSpec scratch = Buffer("scratch", {1024});
    scratch.persistent = false;
    return MakeModule({Parameter("a", {1024}), Parameter("b", {1024}), tied, frozen,
                       Buffer("mean", {1024}), scratch},
                      0);
  }

  uint64_t used() const { return snapshot_budget_->used(); }
  uint64_t promised() const { return device_.holds()->promised_bytes(); }
};

TEST_F(HoldsTest, StoragesThatVersionsShareAreChargedOnce) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  Snapshot first = *module->Hold();
  EXPECT_EQ(used(), 5 * kBytes);  // the tied name is no storage of its own; "scratch" is one
  ASSERT_TRUE(Push(*module, {{"a", 1}}).ok());
  Snapshot second = *module->Hold();
  EXPECT_EQ(used(), 6 * kBytes);
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  Snapshot third = *module->Hold();
  EXPECT_EQ(used(), 8 * kBytes);
  ASSERT_TRUE(SetRequiresGrad(*module, Names({"b"}), false).ok());
  Snapshot fourth = *module->Hold();  // shares everything
  EXPECT_EQ(used(), 8 * kBytes);
  EXPECT_EQ(device_.holds()->held_versions(), 4u);

  third = Snapshot();
  EXPECT_EQ(used(), 8 * kBytes);
  first = Snapshot();  // its "a" alone; "b" is also the second's
  EXPECT_EQ(used(), 7 * kBytes);
  second = Snapshot();
  EXPECT_EQ(used(), 5 * kBytes);
  fourth = Snapshot();
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(device_.holds()->held_versions(), 0u);
}

TEST_F(HoldsTest, CapturedOptimizerStateIsChargedUntilTheSaveEnds) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  Snapshot reader = *module->Hold();
  EXPECT_EQ(used(), 5 * kBytes);
  {
    const CapturedState save = *Capture(*module);
    EXPECT_EQ(used(), 9 * kBytes);
    EXPECT_EQ(promised(), 9 * kBytes);
    EXPECT_EQ(device_.holds()->held_versions(), 1u);
    {
      const CapturedState another = *Capture(*module);
      EXPECT_EQ(used(), 9 * kBytes);
    }
    // The step writes "a" and its moments elsewhere: what is held of them is no promise any more.
    ASSERT_TRUE(Push(*module, {{"a", 1}}).ok());
    EXPECT_EQ(used(), 9 * kBytes);
    EXPECT_EQ(promised(), 6 * kBytes);
    reader = Snapshot();
    EXPECT_EQ(used(), 9 * kBytes);
    EXPECT_EQ(*module->HoldNumber(save.snapshot->version.number).value()->metadata,
              *save.snapshot->metadata);
  }
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(promised(), 0u);
  // The moments are the module's alone again: a step writes them in place.
  const uint64_t before = device_.pool()->usage().used_bytes;
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  EXPECT_EQ(device_.pool()->usage().used_bytes, before);
}

TEST_F(HoldsTest, SaveOfWeightsAloneHoldsWhatAReaderDoes) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  const CapturedState save = *Capture(*module, /*with_optimizer=*/false);
  EXPECT_EQ(used(), 5 * kBytes);
  EXPECT_EQ(save.optimizer, nullptr);
  EXPECT_TRUE(save.optimizer_state.parameters.empty());
  EXPECT_TRUE(save.workers.empty());
}

TEST_F(HoldsTest, ListedOptimizerStateIsChargedOnlyWhileItsElementsAreRead) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  OptimizerStateQuery query;
  query.schema = module->Current()->schema;
  query.epoch = module->optimizer_epoch();
  query.parameters = std::make_shared<const std::vector<uint32_t>>(std::vector<uint32_t>{0, 1});
  query.max_entries = 100;
  const auto read = [&] {
    return Await<OptimizerStatePart>([&](ModuleInstance::Done<OptimizerStatePart> done) {
      module->ReadOptimizerState(query, std::move(done));
    });
  };
  {
    const absl::StatusOr<OptimizerStatePart> names = read();
    ASSERT_TRUE(names.ok()) << names.status();
    EXPECT_EQ(names->entries.size(), 6u);
    EXPECT_EQ(used(), 0u);
    query.max_referenced_bytes = 64 * kBytes;
    const absl::StatusOr<OptimizerStatePart> elements = read();
    ASSERT_TRUE(elements.ok()) << elements.status();
    EXPECT_EQ(used(), 4 * kBytes);
    // A part that waits keeps no version: what the step replaces goes back.
    const uint64_t before = device_.pool()->usage().used_bytes;
    ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
    EXPECT_EQ(device_.pool()->usage().used_bytes, before + 4 * kBytes);
  }
  EXPECT_EQ(used(), 0u);
}

TEST_F(HoldsTest, PromiseIsWhatIsCurrentAndHeld) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  EXPECT_EQ(promised(), 0u);
  Snapshot held = *module->Hold();
  EXPECT_EQ(promised(), 5 * kBytes);
  ASSERT_TRUE(Push(*module, {{"a", 1}}).ok());
  EXPECT_EQ(promised(), 4 * kBytes);  // the old "a" stays already
  Snapshot next = *module->Hold();
  EXPECT_EQ(promised(), 5 * kBytes);
  held = Snapshot();
  EXPECT_EQ(promised(), 5 * kBytes);
  next = Snapshot();
  EXPECT_EQ(promised(), 0u);
  held = *module->Hold();
  Delete(*module);  // nothing supersedes it any more
  EXPECT_EQ(promised(), 0u);
  EXPECT_EQ(used(), 5 * kBytes);
  held = Snapshot();
  EXPECT_EQ(used(), 0u);
}

// Plays random holds, releases, steps and freezes; the account is that of a set of storages.
TEST_F(HoldsTest, AccountIsExactInEveryOrderOfReleases) {
  const uint64_t seed = 20240611;
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  std::vector<Snapshot> held;
  std::vector<CapturedState> saves;
  const auto expect_exact = [&] {
    std::map<const TensorStorage*, uint64_t> storages;
    std::set<uint64_t> numbers;
    const auto add = [&](const Snapshot& snapshot) {
      numbers.insert(snapshot->version.number);
      for (const StorageRef& storage : snapshot->storages)
        storages[storage.get()] = storage->size();
    };
    for (const Snapshot& snapshot : held) add(snapshot);
    for (const CapturedState& save : saves) {
      add(save.snapshot);
      for (const ParameterState& parameter : save.optimizer_state.parameters) {
        for (const auto& slot : parameter.slots) {
          if (slot) storages[slot.get()] = slot->size();
        }
      }
    }
    uint64_t bytes = 0;
    for (const auto& [storage, size] : storages) bytes += size;
    ASSERT_EQ(used(), bytes);
    ASSERT_EQ(device_.holds()->held_versions(), numbers.size());
  };
  const auto take = [&random](auto& list) {
    const size_t at = random() % list.size();
    auto item = std::move(list[at]);
    list.erase(list.begin() + static_cast<std::ptrdiff_t>(at));
    return item;
  };
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(i);
    switch (random() % 8) {
      case 0:
      case 1:
        held.push_back(*module->Hold());
        break;
      case 2:
        if (!held.empty()) {
          const auto& some = held[random() % held.size()];
          held.push_back(*module->HoldNumber(some->version.number));
        }
        break;
      case 3:
      case 4:
        if (!held.empty()) take(held);
        break;
      case 5: {
        std::vector<PushTensor> push;
        for (const char* name : {"a", "b"}) {
          if (random() % 2 == 0) push.push_back({name, 1});
        }
        if (random() % 4 == 0) push.push_back({"mean", 1, TensorKind::kBuffer});
        if (push.empty()) break;
        ASSERT_TRUE(Push(*module, push).ok());
        break;
      }
      case 6:
        ASSERT_TRUE(SetRequiresGrad(*module, Names({"frozen"}), random() % 2 == 0).ok());
        break;
      case 7:
        if (saves.empty() || random() % 2 == 0) {
          saves.push_back(*Capture(*module));
        } else {
          take(saves);
        }
        break;
    }
    expect_exact();
  }
  while (!held.empty()) {
    take(held);
    expect_exact();
  }
  while (!saves.empty()) {
    take(saves);
    expect_exact();
  }
  EXPECT_EQ(used(), 0u);
}

TEST_F(HoldsTest, HoldsOfManyThreadsBesideStepsEndWithNothingUsed) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (uint64_t t = 0; t < 4; ++t) {
    readers.emplace_back([&, t] {
      std::mt19937_64 random(t);
      std::vector<Snapshot> held;
      while (!stop) {
        if (random() % 2 == 0 || held.empty()) {
          held.push_back(*module->Hold());
        } else if (random() % 4 == 0) {
          const auto again = module->HoldNumber(held.back()->version.number);
          ASSERT_TRUE(again.ok()) << again.status();
        } else if (random() % 8 == 0) {
          const auto save = Capture(*module);
          ASSERT_TRUE(save.ok()) << save.status();
        } else {
          held.erase(held.begin() + static_cast<std::ptrdiff_t>(random() % held.size()));
        }
        if (held.size() > 20) held.clear();
      }
    });
  }
  for (int step = 0; step < 300; ++step) {
    ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", step % 2 == 0 ? 1.0F : 0.0F}}).ok());
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(promised(), 0u);
  EXPECT_EQ(device_.holds()->held_versions(), 0u);
  module.reset();
  strands_.join();
  EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
}

class TightBudgetTest : public HoldsTest {
 protected:
  TightBudgetTest() : HoldsTest(uint64_t{1} << 30, 6 * kBytes) {}
};

TEST_F(TightBudgetTest, RefusedHoldLeavesTheAccountAsItWas) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  Snapshot first = *module->Hold();
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  for (int i = 0; i < 3; ++i) {
    const auto refused = module->Hold();  // two tensors more than the five; there is room for one
    EXPECT_THAT(ReasonOf(refused), Eq(Reason::kSnapshotLimit));
    EXPECT_TRUE(GetRetryAfter(refused.status()).has_value());
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr("cannot hold version"));
    EXPECT_THAT(ReasonOf(Capture(*module)), Eq(Reason::kSnapshotLimit));
    EXPECT_EQ(used(), 5 * kBytes);
    EXPECT_EQ(promised(), 3 * kBytes);
    EXPECT_EQ(device_.holds()->held_versions(), 1u);
  }
  EXPECT_TRUE(module->HoldNumber(first->version.number).ok());  // costs nothing more
  first = Snapshot();
  EXPECT_EQ(used(), 0u);
  EXPECT_TRUE(module->Hold().ok());
}

TEST_F(TightBudgetTest, LeaseIsNotRevokedWhereMemoryIsShort) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  PinTable pins([this] { return now_; }, absl::Minutes(10));
  const std::string id = pins.Create(module, absl::Seconds(60))->id;
  const uint64_t number = pins.Find(id)->snapshot->version.number;
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  EXPECT_THAT(ReasonOf(pins.Create(module, absl::Seconds(60))), Eq(Reason::kSnapshotLimit));
  EXPECT_EQ(pins.size(), 1u);
  now_ += absl::Seconds(59);
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  EXPECT_EQ(pins.Find(id)->snapshot->version.number, number);
  now_ += absl::Seconds(1);
  EXPECT_TRUE(pins.Create(module, absl::Seconds(60)).ok());  // ends what is over by itself
  EXPECT_THAT(ReasonOf(pins.Find(id)), Eq(Reason::kSnapshotNotFound));
  EXPECT_EQ(used(), 5 * kBytes);
}

TEST_F(HoldsTest, LeaseThatIsOverGivesTheMemoryBackToTheDevice) {
  auto module = MakeMixed();
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  const uint64_t model = device_.pool()->usage().used_bytes;
  PinTable pins([this] { return now_; }, absl::Minutes(10));
  ASSERT_TRUE(pins.Create(module, absl::Seconds(60)).ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  EXPECT_EQ(device_.pool()->usage().used_bytes, model + 2 * kBytes);
  now_ += absl::Seconds(60);
  pins.ExpireDue();
  EXPECT_EQ(pins.size(), 0u);
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(device_.pool()->usage().used_bytes, model);
}

TEST_F(HoldsTest, PinOfADeletedModuleIsRefusedAndLeavesNone) {
  auto module = MakeMixed();
  PinTable pins([this] { return now_; }, absl::Minutes(10));
  Delete(*module);
  pins.ReleaseModule(*module);
  EXPECT_THAT(ReasonOf(pins.Create(module, absl::Seconds(60))), Eq(Reason::kModuleDeleted));
  EXPECT_EQ(pins.size(), 0u);
  EXPECT_EQ(used(), 0u);
}

// A device that is small beside the budget for held versions.
class StarvationTest : public HoldsTest {
 protected:
  explicit StarvationTest(uint64_t tensors = 16) : HoldsTest(tensors * kBytes, uint64_t{1} << 40) {}

  // A reader comes after every step until it is refused; steps go on as if there were none.
  void HoldUntilRefused(ModuleInstance& module, std::vector<Snapshot>* held) {
    const std::vector<PushTensor> push = {{"a", 1}, {"b", 1}};
    int refusals = 0;
    for (int step = 0; refusals < 10; ++step) {
      absl::StatusOr<Snapshot> snapshot = module.Hold();
      if (snapshot.ok()) {
        held->push_back(*std::move(snapshot));
      } else {
        ++refusals;
        ASSERT_THAT(ReasonOf(snapshot), Eq(Reason::kSnapshotLimit));
        ASSERT_TRUE(GetRetryAfter(snapshot.status()).has_value());
        ASSERT_THAT(std::string(snapshot.status().message()), HasSubstr("--device_memory_bytes"));
      }
      const auto answer = Push(module, push);
      ASSERT_TRUE(answer.ok()) << "step " << step << ": " << answer.status();
    }
  }
};

TEST_F(StarvationTest, ReadersOfEveryVersionNeverStarveAnSgdStep) {
  auto module = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  std::vector<Snapshot> held;
  HoldUntilRefused(*module, &held);
  // 2 (current) + 2n (held) + 2 (the step) <= 16: no reader is refused without need.
  EXPECT_EQ(held.size(), 6u);
  held.pop_back();
  EXPECT_TRUE(module->Hold().ok());
}

TEST_F(StarvationTest, ReadersNeverStarveTheFirstStepOfAdamW) {
  auto module = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  std::vector<Snapshot> held;
  HoldUntilRefused(*module, &held);
  EXPECT_EQ(held.size(), 4u);  // 2 + 4 (moments) + 2n + 2 <= 16
}

TEST_F(StarvationTest, SavesNeverStarveAStep) {
  auto module = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  std::vector<CapturedState> saves;
  for (int step = 0; step < 10; ++step) {
    absl::StatusOr<CapturedState> save = Capture(*module);
    if (save.ok()) saves.push_back(*std::move(save));
    const auto answer = Push(*module, {{"a", 1}, {"b", 1}});
    ASSERT_TRUE(answer.ok()) << "step " << step << ": " << answer.status();
  }
  EXPECT_EQ(saves.size(), 1u);  // 6 + 6n + 2 <= 16
}

TEST_F(StarvationTest, ReadersOfASmallModuleLeaveRoomForTheStepOfALargeOne) {
  auto small = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  auto large = MakeModule({Parameter("w", {4 * 1024})}, 0);
  ASSERT_TRUE(Configure(*small, Sgd()).ok());
  ASSERT_TRUE(Configure(*large, Sgd(1, 0.9)).ok());
  std::vector<Snapshot> held;
  HoldUntilRefused(*small, &held);
  EXPECT_EQ(held.size(), 1u);  // 2 + 4 + 2n + 4 (momentum to come) + 4 <= 16
  for (int step = 0; step < 3; ++step) ASSERT_TRUE(Push(*large, {{"w", 1}}).ok());
}

TEST_F(StarvationTest, PromiseThatAnOlderVersionKeepsCountsToo) {
  auto module = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  auto other = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  ASSERT_TRUE(Configure(*module, Sgd()).ok());
  ASSERT_TRUE(Configure(*other, Sgd()).ok());
  std::vector<Snapshot> held;
  for (int i = 0; i < 10; ++i) {
    // When the other module is held, the version that is current here is not, but its storages are.
    for (ModuleInstance* each : {module.get(), other.get()}) {
      absl::StatusOr<Snapshot> snapshot = each->Hold();
      if (snapshot.ok()) held.push_back(*std::move(snapshot));
      ASSERT_TRUE(Configure(*module, Sgd()).ok());
    }
    for (ModuleInstance* each : {module.get(), other.get()}) {
      const auto answer = Push(*each, {{"a", 1}, {"b", 1}});
      ASSERT_TRUE(answer.ok()) << i << ": " << answer.status();
    }
  }
  EXPECT_EQ(held.size(), 5u);  // 2 + 2 + 2n + 2 <= 16
}

TEST_F(StarvationTest, WhereNothingStepsEveryHoldThatFitsTheBudgetIsAdmitted) {
  auto module = MakeModule({Parameter("a", {12 * 1024})}, 0);  // more than half of the device
  EXPECT_TRUE(module->Hold().ok());
}

// Room for the model, its moments and one push.
class OneStepTest : public StarvationTest {
 protected:
  OneStepTest() : StarvationTest(8) {}
};

TEST_F(OneStepTest, ReaderBeforeTheFirstStepLeavesRoomForTheMomentsToCome) {
  auto module = MakeModule({Parameter("a", {1024}), Parameter("b", {1024})}, 0);
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  std::vector<Snapshot> held;
  HoldUntilRefused(*module, &held);
  EXPECT_TRUE(held.empty());
}

}  // namespace
}  // namespace modelstate
