// What the service is for: a reader sees one whole version, however many steps go on beside it.
#include <atomic>
#include <barrier>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/server/module/module_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

constexpr uint64_t kFirstStepVersion = 2;  // creation, then the optimizer: step 0

// SGD with lr 1 and gradients of -1 on zeros makes every element of every parameter the number of
// its step, and a push sets the buffer to it. nullopt: `version` is whole.
std::optional<std::string> FindTear(const ModuleVersion& version) {
  const float expected = static_cast<float>(version.step);
  if (version.version.number != version.step + kFirstStepVersion) {
    return absl::StrCat("version ", version.version.number, " says step ", version.step);
  }
  for (uint32_t i = 0; i < version.schema->size(); ++i) {
    const std::vector<uint8_t> bytes = BytesOf(*version.storages[i]);
    for (size_t k = 0; k + 4 <= bytes.size(); k += 4) {
      float value = 0;
      std::memcpy(&value, bytes.data() + k, 4);
      if (value != expected) {
        return absl::StrCat("\"", version.schema->spec(i).name, "\"[", k / 4, "] is of step ",
                            value, " in a snapshot of step ", expected);
      }
    }
  }
  return std::nullopt;
}

class AtomicityTest : public ModuleFixture {
 protected:
  AtomicityTest() : ModuleFixture(uint64_t{1} << 30, uint64_t{1} << 31) {
    std::mt19937_64 random(seed_);
    std::vector<TensorSpec> specs;
    for (int i = 0; i < 24; ++i) {
      // Some of no elements, some of a part of a block, some of several.
      const int64_t elements = static_cast<int64_t>(random() % (i % 4 == 0 ? 20000 : 300));
      specs.push_back(Parameter(absl::StrCat("p", i), {elements}));
      push_.push_back({specs.back().name, -1});
    }
    specs.push_back(Buffer("steps", {33}));
    push_.push_back({"steps", 0, TensorKind::kBuffer});
    module_ = MakeModule(std::move(specs), 0);
  }

  // A push may leave parameters out; here it never does, so that all elements stay equal.
  void StepOnce() {
    push_.back().value += 1;
    const auto answer = Push(*module_, push_);
    ASSERT_TRUE(answer.ok()) << answer.status();
  }

  const uint64_t seed_ = 20240611;
  std::vector<PushTensor> push_;
  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(AtomicityTest, EverySnapshotIsOneWholeVersionThatWasCurrent) {
  SCOPED_TRACE(absl::StrCat("seed ", seed_));
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  constexpr int kReaders = 16;
  // The fake GPU does one thing at a time.
  const bool on_host = TestDevice() == "cpu";
  const int kSnapshotsPerReader = on_host ? 60 : 6;
  const uint64_t kSteps = on_host ? 300 : 30;
  std::atomic<int> reading{kReaders};
  std::atomic<int> failures{0};
  std::vector<std::string> problems(kReaders);
  std::vector<std::thread> readers;
  for (int r = 0; r < kReaders; ++r) {
    readers.emplace_back([&, r] {
      Snapshot kept;  // read again later: what is published is never written
      for (int i = 0; problems[r].empty(); ++i) {
        if (i >= kSnapshotsPerReader && module_->Current()->step >= kSteps) break;
        const uint64_t before = module_->Current()->version.number;
        absl::StatusOr<Snapshot> snapshot = module_->Hold();
        const uint64_t after = module_->Current()->version.number;
        if (!snapshot.ok()) {
          problems[r] = std::string(snapshot.status().message());
          break;
        }
        const uint64_t number = (*snapshot)->version.number;
        if (number < before || number > after) {
          problems[r] =
              absl::StrCat("version ", number, " was not current between ", before, " and ", after);
        } else {
          problems[r] = FindTear(**snapshot).value_or("");
        }
        if (i % 8 == 0) {
          if (kept && problems[r].empty()) problems[r] = FindTear(*kept).value_or("");
          kept = *std::move(snapshot);
        }
      }
      if (!problems[r].empty()) ++failures;
      --reading;
    });
  }
  uint64_t steps = 0;
  while (reading > 0 || steps < kSteps) {
    StepOnce();
    ++steps;
    if (HasFatalFailure()) break;
  }
  for (std::thread& reader : readers) reader.join();
  for (const std::string& problem : problems) EXPECT_EQ(problem, "");
  EXPECT_EQ(failures, 0);
  EXPECT_EQ(module_->Current()->step, steps);
  EXPECT_EQ(FindTear(*module_->Current()), std::nullopt);
}

// The same reader against a publisher that breaks the rule: it writes the storages that readers
// hold. It stops half way, where the readers look, so that the tear is there in every run.
TEST_F(AtomicityTest, CheckFindsTheTearOfAPublisherThatWritesInPlace) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  StepOnce();
  constexpr int kReaders = 16;
  std::barrier half_written(kReaders + 1);
  std::atomic<int> torn{0};
  std::vector<std::thread> readers;
  const Snapshot held = *module_->Hold();
  ASSERT_EQ(FindTear(*held), std::nullopt);
  for (int r = 0; r < kReaders; ++r) {
    readers.emplace_back([&] {
      half_written.arrive_and_wait();
      if (FindTear(*held)) ++torn;
    });
  }
  for (uint32_t i = 0; i < held->schema->size() / 2; ++i) {
    std::vector<uint8_t> bytes = BytesOf(*held->storages[i]);
    const float next = static_cast<float>(held->step + 1);
    for (size_t k = 0; k + 4 <= bytes.size(); k += 4) {
      std::memcpy(bytes.data() + k, &next, 4);
    }
    SetBytes(bytes, const_cast<TensorStorage&>(*held->storages[i]));
  }
  half_written.arrive_and_wait();
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn, kReaders);
}

TEST_F(AtomicityTest, CheckFindsOneElementOfTheVersionBefore) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  StepOnce();
  const Snapshot held = *module_->Hold();
  // The last element of the last parameter only.
  uint32_t index = static_cast<uint32_t>(held->schema->size()) - 2;
  while (held->storages[index]->size() == 0) --index;
  std::vector<uint8_t> bytes = BytesOf(*held->storages[index]);
  const float old = 0;
  std::memcpy(bytes.data() + bytes.size() - 4, &old, 4);
  SetBytes(bytes, const_cast<TensorStorage&>(*held->storages[index]));
  EXPECT_NE(FindTear(*held), std::nullopt);
}

class StepMemoryTest : public ModuleFixture {
 protected:
  static constexpr uint64_t kModelBytes = (4096 + 3 * 1000) * 4;
  // The model, its AdamW moments and one push: not a byte more.
  StepMemoryTest() : ModuleFixture(4 * kModelBytes) {
    module_ = MakeModule({Parameter("a", {4096}), Parameter("b", {1000}), Parameter("c", {1000}),
                          Parameter("d", {1000})},
                         0);
  }
  const std::vector<PushTensor> push_{{"a", 1}, {"b", 1}, {"c", 1}, {"d", 1}};
  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(StepMemoryTest, HundredStepsFitInModelMomentsAndOnePush) {
  ASSERT_TRUE(Configure(*module_, AdamW()).ok());
  ASSERT_TRUE(Push(*module_, push_).ok());
  const BufferPool::Usage first = device_.pool()->usage();
  EXPECT_EQ(first.used_bytes, 3 * kModelBytes);
  EXPECT_EQ(first.pooled_bytes, kModelBytes);
  for (int step = 0; step < 100; ++step) {
    const auto answer = Push(*module_, push_);
    ASSERT_TRUE(answer.ok()) << "step " << step << ": " << answer.status();
    // At the answer already: the old parameters are back in the pool, for the next push.
    const BufferPool::Usage now = device_.pool()->usage();
    ASSERT_EQ(now.used_bytes, first.used_bytes) << "step " << step;
    ASSERT_EQ(now.pooled_bytes, first.pooled_bytes) << "step " << step;
  }
  EXPECT_EQ(push_budget_->used(), 0u);
}

TEST_F(StepMemoryTest, HeldVersionGoesBackToThePoolWithItsLastReader) {
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  Snapshot held = *module_->Hold();
  Snapshot copy = held;
  ASSERT_TRUE(Push(*module_, push_).ok());
  ASSERT_TRUE(Push(*module_, push_).ok());
  EXPECT_EQ(device_.pool()->usage().used_bytes, 2 * kModelBytes);
  held = Snapshot();
  EXPECT_EQ(device_.pool()->usage().used_bytes, 2 * kModelBytes);
  copy = Snapshot();
  EXPECT_EQ(device_.pool()->usage().used_bytes, kModelBytes);
}

}  // namespace
}  // namespace modelstate
