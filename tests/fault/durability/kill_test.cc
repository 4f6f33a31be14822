// kill -9 at every system call of what changes the store that touches a file.

#include <cstdio>
#include <set>

#include "tests/fault/durability/durability_fixture.h"

namespace modelstate::fault {
namespace {

class KillTest : public DurabilityFixture {
 protected:
  struct Scenario {
    std::string name;
    std::function<void()> prepare;
    std::function<absl::Status()> run;
    // Of what the scenario changes: before, and when it has ended.
    std::string path;
    int before = kAbsent;
    int after = kAbsent;
  };

  // Kills at the begin of call `index`, or in the middle of it where `torn`; false when there is no
  // such call.
  bool KillAt(const Scenario& scenario, size_t index, bool torn) {
    size_t seen = 0;
    bool here = false;
    Observer observer;
    observer.before = [&](const SystemCall& call) -> Verdict {
      if (!TouchesFiles(call) || seen++ != index) return {};
      killed_at_ = CallName(call);
      if (!torn) return {Verdict::kKill};
      here = IsWrite(call);
      return {here ? Verdict::kShorten : Verdict::kRun};
    };
    observer.after = [&](const SystemCall&) { return here; };
    const int exit = RunTraced([&] { return scenario.run().ok() ? 0 : 1; }, observer);
    EXPECT_TRUE(exit == 0 || exit == -1) << "exit " << exit;
    return exit == -1 && !HasFailure();
  }

  // The points at which it was killed: every one, or one of `stride`.
  size_t KillEverywhere(const Scenario& scenario, size_t stride = 1) {
    size_t points = 0;
    std::set<int> outcomes;
    for (const bool torn : {false, true}) {
      for (size_t index = 0;; index += stride) {
        SCOPED_TRACE(absl::StrCat(scenario.name, ", killed at call ", index, torn ? ", torn" : ""));
        Clear();
        scenario.prepare();
        killed_at_.clear();
        if (!KillAt(scenario, index, torn)) {
          if (killed_at_.empty()) break;
          continue;  // torn, and no write
        }
        ++points;
        // Also without a restart: another reader of the root sees no mixture.
        std::string why;
        const int seen = LoadedState(scenario.path, &why);
        EXPECT_TRUE(seen == scenario.before || seen == scenario.after) << seen << ": " << why;
        EXPECT_EQ(CheckRestart(), "");
        EXPECT_EQ(LoadedState(scenario.path, &why), seen) << why;
        outcomes.insert(seen);
        const auto next = SaveState(2, scenario.path, /*overwrite=*/true);
        EXPECT_TRUE(next.ok()) << next.status();
        EXPECT_EQ(LoadedState(scenario.path, &why), 2) << why;
        if (HasFailure()) {
          ADD_FAILURE() << "killed at " << killed_at_;
          return points;
        }
      }
    }
    EXPECT_EQ(outcomes.size(), scenario.before == scenario.after ? 1u : 2u);
    std::printf("%s: killed at %zu points\n", scenario.name.c_str(), points);
    return points;
  }

  std::string killed_at_;
};

TEST_F(KillTest, ASaveThatIsKilledAtAnyCallLeavesTheOldOrTheNewCheckpointWhole) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(IsFull() ? 1'500'000 : 3'000));
  const auto save = [this](int state, const std::string& path) {
    return [this, state, path] { return SaveState(state, path, true).status(); };
  };
  size_t points = 0;
  points += KillEverywhere({"a first save", [] {}, save(0, "step"), "step", kAbsent, 0});
  points += KillEverywhere(
      {"a first save in new directories", [] {}, save(0, "run/a/step"), "run/a/step", kAbsent, 0});
  points += KillEverywhere({"a save over another", [&] { ASSERT_TRUE(save(0, "run/step")().ok()); },
                            save(1, "run/step"), "run/step", 0, 1});
  points += KillEverywhere({"a deletion", [&] { ASSERT_TRUE(save(0, "run/step")().ok()); },
                            [this] { return store_->Delete("run/step"); }, "run/step", 0, kAbsent});
  points += KillEverywhere(
      {"the start after a crash",
       [&] {
         ASSERT_TRUE(save(1, "run/step")().ok());
         ASSERT_TRUE(save(0, "run/half")().ok());
         std::filesystem::rename(root_ / "run/half", root_ / "run/step.tmp-0123456789abcdef");
       },
       [this] { return CheckpointStore::Open(root_.string()).status(); }, "run/step", 1, 1});
  std::printf("killed at %zu points in all\n", points);
  EXPECT_GE(points, 200u);
}

// Of a file of several blocks all but the last are written by another thread.
TEST_F(KillTest, ASaveOfSeveralBlocksToADiskThatIsKilledLeavesTheOldOrTheNewCheckpointWhole) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  UseDirectory(testing::TempDir());
  ASSERT_NO_FATAL_FAILURE(Train(IsFull() ? 4'000'000 : 1'500'000));
  const size_t points = KillEverywhere(
      {"a save of several blocks", [&] { ASSERT_TRUE(SaveState(0, "run/step", true).ok()); },
       [this] { return SaveState(1, "run/step", true).status(); }, "run/step", 0, 1},
      IsFull() ? 1 : 4);
  EXPECT_GE(points, IsFull() ? 60u : 15u);
}

}  // namespace
}  // namespace modelstate::fault
