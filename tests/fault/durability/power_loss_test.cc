// Power cuts: what a disk may hold at any moment of several saves, made from their recorded calls.

#include <algorithm>
#include <cstdio>
#include <unordered_set>

#include "common/base/digest.h"
#include "tests/fault/durability/disk_model.h"
#include "tests/fault/durability/durability_fixture.h"

namespace modelstate::fault {
namespace {

constexpr uint32_t kSeed = 20240611;

class PowerLossTest : public DurabilityFixture {
 protected:
  // What may be found at a path.
  struct Allowed {
    int before = kAbsent;
    int after = kAbsent;
  };

  // Runs `change`, which takes `path` to state `after`, and records it.
  void Record(const std::string& path, int after, const std::function<absl::Status()>& change) {
    begins_.push_back({recorder_.ops.size(), path, after});
    const int exit = RunTraced([&] { return change().ok() ? 0 : 1; }, recorder_.AsObserver());
    ASSERT_EQ(exit, 0);
    recorder_.Acknowledge(path);
  }

  // Saves into new directories, over another, beside it, and a deletion.
  void RecordAll() {
    const auto save = [this](int state, const std::string& path) {
      Record(path, state, [=, this] { return SaveState(state, path, true).status(); });
    };
    save(0, "run/step");
    save(1, "run/step");
    save(2, "run/deep/er/other");
    Record("run/step", kAbsent, [this] { return store_->Delete("run/step"); });
    save(0, "run/step");
    save(1, "run/deep/er/other");
  }

  // What may be found after a power cut that followed the first `count` calls.
  std::map<std::string, Allowed> AllowedAfter(size_t count) const {
    std::map<std::string, Allowed> allowed;
    for (const Change& change : begins_) {
      Allowed& at = allowed[change.path];
      if (change.begin >= count) continue;
      at.after = change.state;
      // Up to the acknowledgement either is right, from then on only the new one.
      for (size_t i = change.begin; i < count; ++i) {
        if (recorder_.ops[i].kind == DiskOp::kAcknowledge) {
          at.before = change.state;
          break;
        }
      }
    }
    return allowed;
  }

  // Checks disks after a cut behind each call of `ops`; the first that is wrong, or empty.
  // `ops` are those recorded, in which some may be without effect.
  std::string CheckCuts(const std::vector<DiskOp>& ops, size_t images_per_cut, size_t* states) {
    std::mt19937 random(kSeed);
    std::unordered_set<uint64_t> seen;
    for (size_t count = 0; count <= ops.size(); ++count) {
      const auto allowed = AllowedAfter(count);
      for (const DiskImage& image : PowerCut(ops, count).Images(images_per_cut, random)) {
        std::string text = absl::StrCat(count, "\n");
        for (const auto& [path, content] : image) {
          absl::StrAppend(&text, path, "\n", content.size(), "\n", content);
        }
        if (!seen.insert(Xxh3({reinterpret_cast<const uint8_t*>(text.data()), text.size()}))
                 .second) {
          continue;
        }
        ++*states;
        Materialize(image, root_);
        std::string problem = CheckRestart();
        for (auto it = allowed.begin(); it != allowed.end() && problem.empty(); ++it) {
          std::string why;
          const int found = LoadedState(it->first, &why);
          if (found == it->second.before || found == it->second.after) continue;
          problem = absl::StrCat(it->first, " is state ", found, ", not ", it->second.before,
                                 " or ", it->second.after, ": ", why);
        }
        if (!problem.empty()) {
          return absl::StrCat("after ", count, " calls, seed ", kSeed, ": ", problem);
        }
      }
    }
    return "";
  }

  // Whether call `i` syncs the directory of a rename just before it.
  bool AfterRename(size_t i) const {
    const DiskOp::Kind before = i == 0 ? DiskOp::kSync : recorder_.ops[i - 1].kind;
    return before == DiskOp::kRename || before == DiskOp::kExchange;
  }

  struct Change {
    size_t begin;
    std::string path;
    int state;
  };
  std::vector<Change> begins_;
  DiskRecorder recorder_{root_};
};

TEST_F(PowerLossTest, WhatAnyPowerCutLeavesIsTheOldOrTheNewCheckpointWhole) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(IsFull() ? 5'000 : 500));
  ASSERT_NO_FATAL_FAILURE(RecordAll());
  size_t states = 0;
  EXPECT_EQ(CheckCuts(recorder_.ops, IsFull() ? 2500 : 60, &states), "");
  std::printf("%zu calls recorded, %zu states of the disk\n", recorder_.ops.size(), states);
  EXPECT_GE(states, IsFull() ? 5000u : 300u);
}

// Shows that the check would see a save that leaves a sync out. Only those of directories that an
// earlier save had synced already make no difference.
TEST_F(PowerLossTest, ASaveThatLeavesOutASyncIsCaught) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(500));
  ASSERT_NO_FATAL_FAILURE(RecordAll());
  size_t caught = 0;
  for (size_t i = 0; i < recorder_.ops.size(); ++i) {
    const DiskOp& op = recorder_.ops[i];
    if (op.kind != DiskOp::kSync) continue;
    std::vector<DiskOp> without = recorder_.ops;
    without[i].kind = DiskOp::kAcknowledge;
    size_t states = 0;
    if (!CheckCuts(without, 24, &states).empty()) {
      ++caught;
      continue;
    }
    EXPECT_TRUE(op.path.find(".tmp-") == std::string::npos && !AfterRename(i))
        << "without the sync of " << op.path << ", call " << i << ", nothing is lost";
  }
  std::printf("%zu left out syncs were caught\n", caught);
  EXPECT_GE(caught, 25u);
}

TEST_F(PowerLossTest, ASaveThatRenamesBeforeItsManifestIsWrittenIsCaught) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(500));
  ASSERT_NO_FATAL_FAILURE(RecordAll());
  // What acts on the manifest of the first save comes after its rename, under the new name.
  std::vector<DiskOp> early = recorder_.ops;
  const auto rename = std::find_if(early.begin(), early.end(),
                                   [](const DiskOp& op) { return op.kind == DiskOp::kRename; });
  ASSERT_NE(rename, early.end());
  const DiskOp renamed = *rename;
  const auto manifest = std::find_if(early.begin(), rename, [](const DiskOp& op) {
    return op.path.find("manifest.json") != std::string::npos;
  });
  std::rotate(manifest, rename, rename + 1);
  for (DiskOp& op : early) {
    if (op.kind != DiskOp::kRename && op.path.rfind(renamed.path, 0) == 0 && &op > &*manifest) {
      op.path.replace(0, renamed.path.size(), renamed.to);
    }
  }
  size_t states = 0;
  EXPECT_NE(CheckCuts(early, 24, &states), "");
}

}  // namespace
}  // namespace modelstate::fault
