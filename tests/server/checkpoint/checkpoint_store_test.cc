#include "server/checkpoint/checkpoint_store.h"

#include <sys/fsuid.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <set>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "server/checkpoint/manifest.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Eq;
using ::testing::HasSubstr;

class CheckpointStoreTest : public CheckpointFixture {
 protected:
  CheckpointStoreTest() {
    module_ = MakeModule({Parameter("weight", {40, 30}), Buffer("running_mean", {30})});
    EXPECT_TRUE(Configure(*module_, AdamW()).ok());
    EXPECT_TRUE(Push(*module_, {{"weight", 1}}).ok());
  }

  CheckpointInfo Only(bool verify) {
    auto list = store_->List("", {.verify = verify});
    EXPECT_TRUE(list.ok()) << list.status();
    EXPECT_EQ(list->size(), 1u);
    return list->empty() ? CheckpointInfo() : list->front();
  }
  // As a module of another name.
  absl::StatusOr<CheckpointInfo> SaveAsOther(const std::string& path, SaveOptions options) {
    MS_ASSIGN_OR_RETURN(CapturedState state, Capture(*module_));
    state.module = "other";
    static const auto ignore = [](const JobProgress&) {};
    return store_->Save(state, path, options, JobControl(ignore));
  }
  std::vector<std::string> Paths(const std::string& directory, const std::string& after = "",
                                 size_t limit = 100, bool recursive = false) {
    std::vector<std::string> paths;
    auto list = store_->List(directory, {.after = after, .limit = limit, .recursive = recursive});
    EXPECT_TRUE(list.ok()) << list.status();
    for (const CheckpointInfo& info : *list) paths.push_back(info.path);
    return paths;
  }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(CheckpointStoreTest, SaveDescribesWhatListFinds) {
  const auto saved = Save(*module_, "c");
  ASSERT_TRUE(saved.ok()) << saved.status();
  const CheckpointInfo info = Only(/*verify=*/true);
  for (const CheckpointInfo& each : {*saved, info}) {
    EXPECT_EQ(each.path, "c");
    EXPECT_EQ(each.format, "modelstate directory");
    EXPECT_EQ(each.module, "tiny");
    EXPECT_EQ(each.version, module_->Current()->version);
    EXPECT_EQ(each.step, 1u);
    EXPECT_EQ(each.tensor_count, 2u);
    EXPECT_TRUE(each.has_optimizer);
    EXPECT_EQ(each.problem, "");
    uint64_t bytes = 0;
    ASSERT_EQ(each.files.size(), 3u);
    for (const auto& file : each.files) {
      EXPECT_EQ(file.nbytes, fs::file_size(root_ / "c" / file.name)) << file.name;
      bytes += file.nbytes;
    }
    EXPECT_EQ(each.nbytes, bytes);
  }
  EXPECT_EQ(info.verified, true);
  EXPECT_EQ(Only(false).verified, std::nullopt);
  EXPECT_EQ(std::distance(fs::directory_iterator(root_), {}), 1);  // no temporary is left
}

TEST_F(CheckpointStoreTest, OverwriteReplacesAndOnlyWhenAskedFor) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  const std::string first = ReadWhole(root_ / "c/manifest.json");
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
  EXPECT_THAT(ReasonOf(Save(*module_, "c")), Eq(Reason::kCheckpointExists));
  EXPECT_EQ(ReadWhole(root_ / "c/manifest.json"), first);
  const auto saved = Save(*module_, "c", {.overwrite = true});
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(Only(true).step, 2u);
  EXPECT_EQ(std::distance(fs::directory_iterator(root_), {}), 1);
  // Overwrite of what is not there is a plain save.
  EXPECT_TRUE(Save(*module_, "d", {.overwrite = true}).ok());
}

TEST_F(CheckpointStoreTest, SaveRefusesPathsThatWouldLoseOtherFiles) {
  fs::create_directories(root_ / "mine");
  WriteWhole(root_ / "mine/notes.txt", "x");
  WriteWhole(root_ / "file.safetensors", "x");
  ASSERT_TRUE(Save(*module_, "c").ok());
  for (const char* path : {"mine", "file.safetensors", "c/inner", ".", "../out", "/abs", "", "a//b",
                           "x.tmp-0123456789abcdef", "latest", "runs/latest", "m/manifest.json",
                           "model.safetensors", "optimizer.safetensors/x"}) {
    EXPECT_THAT(ReasonOf(Save(*module_, path, {.overwrite = true})), Eq(Reason::kInvalidField))
        << path;
  }
  EXPECT_FALSE(Save(*module_, std::string(240, 'n')).ok());
  // As deep as lists and restores look, and one deeper.
  std::string deep = "d";
  for (int i = 0; i < 16; ++i) deep += "/d";
  ASSERT_TRUE(Save(*module_, deep).ok());
  EXPECT_THAT(Paths("", "", 100, true), Contains(deep));
  EXPECT_FALSE(Save(*module_, "x/" + deep).ok());
  EXPECT_TRUE(Save(*module_, std::string(234, 'n')).ok());
  EXPECT_EQ(ReadWhole(root_ / "mine/notes.txt"), "x");
}

TEST_F(CheckpointStoreTest, SavesToOnePathAtOnceLeaveOneWholeCheckpoint) {
  const CapturedState state = *Capture(*module_);
  static const auto ignore = [](const JobProgress&) {};
  std::atomic<int> won{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const JobControl control(ignore);
      const auto saved = store_->Save(state, "c", {}, control);
      if (saved.ok()) {
        ++won;
      } else {
        EXPECT_THAT(ReasonOf(saved), Eq(Reason::kCheckpointExists));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(won, 1);
  EXPECT_EQ(Only(true).verified, true);
  EXPECT_EQ(std::distance(fs::directory_iterator(root_), {}), 1);
}

// A load opens several files; those that it opens belong to one checkpoint, whatever saves and
// deletions take its place meanwhile.
TEST_F(CheckpointStoreTest, LoadsBesideOverwritingSavesSeeOneWholeCheckpoint) {
  const CapturedState first = *Capture(*module_);
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
  const CapturedState second = *Capture(*module_);
  static const auto ignore = [](const JobProgress&) {};
  const JobControl control(ignore);
  const SaveOptions overwrite = {.overwrite = true};
  ASSERT_TRUE(store_->Save(first, "c", overwrite, control).ok());
  std::atomic<bool> done{false};
  std::thread saver([&] {
    for (int i = 0; !done; ++i) {
      const auto saved = store_->Save(i % 2 == 0 ? second : first, "c", overwrite, control);
      EXPECT_TRUE(saved.ok()) << saved.status();
    }
  });
  const auto loaded_step = [&]() -> absl::StatusOr<uint64_t> {
    auto module = MakeModule({});
    MS_ASSIGN_OR_RETURN(const VersionRef version, Load(*module, "c"));
    return version->step;
  };
  std::set<uint64_t> steps;
  // And until both were seen, which on a busy machine takes longer.
  for (int i = 0; i < 1000 || (steps.size() < 2 && i < 1'000'000); ++i) {
    const auto step = loaded_step();
    EXPECT_TRUE(step.ok()) << step.status();
    if (step.ok()) steps.insert(*step);
    const CheckpointInfo info = *store_->List("", {.limit = 1, .verify = i % 2 == 0})->begin();
    EXPECT_EQ(info.problem, "");
  }
  done = true;
  saver.join();
  EXPECT_THAT(steps, ElementsAre(1u, 2u));
}

TEST_F(CheckpointStoreTest, SaveOverHardLinkedFilesLeavesTheirOtherNamesAlone) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  fs::create_directories(root_ / "copy");
  for (const auto& entry : fs::directory_iterator(root_ / "c")) {
    fs::create_hard_link(entry.path(), root_ / "copy" / entry.path().filename());
  }
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
  ASSERT_TRUE(Save(*module_, "c", {.overwrite = true}).ok());
  auto module = MakeModule({});
  EXPECT_EQ((*Load(*module, "copy"))->step, 1u);
  EXPECT_EQ((*Load(*module, "c"))->step, 2u);
}

TEST_F(CheckpointStoreTest, OpenRemovesWhatACrashLeftAndNothingElse) {
  ASSERT_TRUE(Save(*module_, "runs/a").ok());
  fs::copy(root_ / "runs/a", root_ / "runs/b.tmp-0123456789abcdef", fs::copy_options::recursive);
  fs::create_directories(root_ / "c.tmp-ffffffffffffffff");
  fs::create_directories(root_ / "d.tmp-ffffffffffffffff/deep");  // no save makes that
  fs::create_directories(root_ / "e.tmp-ffffffffffffffff");
  WriteWhole(root_ / "e.tmp-ffffffffffffffff/thesis.txt", "nor that");
  fs::create_directories(root_ / "c.tmp-fffffffffffffff");   // too short: not ours
  fs::create_directories(root_ / "c.tmp-0123456789ABCDEF");  // not as we write it
  WriteWhole(root_ / "file.tmp-0123456789abcdef", "a file is not ours");
  std::vector<std::string> log;
  const auto keep = [&log](const std::string& text) { log.push_back(text); };
  ASSERT_TRUE(CheckpointStore::Open(root_.string(), keep).ok());
  EXPECT_EQ(log.size(), 4U) << "two that are removed and two that stay";
  EXPECT_TRUE(fs::exists(root_ / "d.tmp-ffffffffffffffff/deep"));
  EXPECT_TRUE(fs::exists(root_ / "e.tmp-ffffffffffffffff/thesis.txt"));
  EXPECT_FALSE(fs::exists(root_ / "runs/b.tmp-0123456789abcdef"));
  EXPECT_FALSE(fs::exists(root_ / "c.tmp-ffffffffffffffff"));
  EXPECT_TRUE(fs::exists(root_ / "c.tmp-fffffffffffffff"));
  EXPECT_TRUE(fs::exists(root_ / "c.tmp-0123456789ABCDEF"));
  EXPECT_TRUE(fs::exists(root_ / "file.tmp-0123456789abcdef"));
  EXPECT_THAT(Paths("runs"), ElementsAre("runs/a"));
}

// A server may start on the root while another, which is to end, still saves.
TEST_F(CheckpointStoreTest, AnotherStartLeavesRunningSavesAlone) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  const CapturedState state = *Capture(*module_);
  int starts = 0;
  const auto start = [&](const JobProgress&) {
    EXPECT_TRUE(CheckpointStore::Open(root_.string()).ok());
    ++starts;
  };
  const JobControl start_another(start);
  for (const char* path : {"c", "new/place"}) {
    const auto saved = store_->Save(state, path, {.overwrite = true}, start_another);
    ASSERT_TRUE(saved.ok()) << saved.status();
    EXPECT_TRUE(Load(*module_, path).ok());
  }
  EXPECT_GE(starts, 6);
  ASSERT_TRUE(CheckpointStore::Open(root_.string()).ok());
  EXPECT_EQ(std::distance(fs::directory_iterator(root_), {}), 2);
}

TEST_F(CheckpointStoreTest, APartWithTheNameOfATemporaryOrOfLatestIsRefused) {
  for (const char* path :
       {"a.tmp-0123456789abcdef", "a.tmp-0123456789abcdef/b", "latest", "latest/b", "a/latest/b"}) {
    EXPECT_EQ(GetReason(Save(*module_, path).status()), Reason::kInvalidField) << path;
  }
}

// A process that ends at any of the places where a save reports leaves the old checkpoint.
TEST_F(CheckpointStoreTest, ProcessThatEndsDuringASaveLeavesTheOldCheckpoint) {
  auto module = MakeModule({Parameter("a", {600, 600}), Parameter("b", {600, 600})});
  ASSERT_TRUE(Configure(*module, AdamW()).ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  ASSERT_TRUE(Save(*module, "c").ok());
  ASSERT_TRUE(Push(*module, {{"a", 1}, {"b", 1}}).ok());
  const CapturedState state = *Capture(*module);
  int killed = 0;
  for (int last_report = 1;; ++last_report) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      int reports = 0;
      const auto end_there = [&reports, last_report](const JobProgress&) {
        if (++reports == last_report) _exit(7);
      };
      const JobControl control(end_there);
      const bool saved = store_->Save(state, "c", {.overwrite = true}, control).ok();
      _exit(saved ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status));
    store_ = *CheckpointStore::Open(root_.string());  // the next start
    const CheckpointInfo info = Only(/*verify=*/true);
    EXPECT_EQ(info.verified, true) << info.problem;
    EXPECT_EQ(std::distance(fs::directory_iterator(root_), {}), 1);
    if (WEXITSTATUS(status) == 0) {
      EXPECT_EQ(info.step, 2u);
      break;
    }
    ASSERT_EQ(WEXITSTATUS(status), 7);
    EXPECT_EQ(info.step, 1u) << "after report " << last_report;
    ++killed;
  }
  EXPECT_GE(killed, 6);  // at the begin, in both files, and right before the rename
}

TEST_F(CheckpointStoreTest, DirectoryWithoutManifestIsAProblemAndIsRefused) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  fs::remove(root_ / "c/manifest.json");
  EXPECT_THAT(Only(false).problem, HasSubstr("manifest.json"));
  EXPECT_EQ(Only(true).verified, false);
  auto loaded = MakeModule({});
  EXPECT_THAT(ReasonOf(Load(*loaded, "c")), Eq(Reason::kCheckpointCorrupt));
  EXPECT_EQ(loaded->state(), ModuleState::kEmpty);
}

// One byte changed anywhere: verify finds it, and a load either finds it or does not depend on it.
TEST_F(CheckpointStoreTest, FlippedByteIsFoundByVerifyAndByLoad) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  const auto good = Contents(*module_->Current());
  for (const char* name : {"model.safetensors", "optimizer.safetensors", "manifest.json"}) {
    const fs::path path = root_ / "c" / name;
    const std::string bytes = ReadWhole(path);
    const size_t stride = std::max<size_t>(bytes.size() / 97, 1);
    for (size_t at = 0; at < bytes.size(); at += stride) {
      std::string bad = bytes;
      bad[at] = static_cast<char>(bad[at] ^ 0x10);
      WriteWhole(path, bad);
      const CheckpointInfo info = Only(/*verify=*/true);
      EXPECT_EQ(info.verified, false) << name << " byte " << at;
      EXPECT_NE(info.problem, "") << name << " byte " << at;
      auto module = MakeModule({});
      const auto loaded = Load(*module, "c");
      if (loaded.ok()) {
        // A byte of the header that says nothing, such as free metadata.
        EXPECT_EQ(Contents(**loaded), good) << name << " byte " << at;
        EXPECT_EQ(std::string(name).substr(0, 8) == "manifest", false) << at;
      } else {
        EXPECT_EQ(module->state(), ModuleState::kEmpty);
      }
    }
    // The elements are at the end of the file.
    if (absl::EndsWith(name, ".safetensors")) {
      std::string bad = bytes;
      bad.back() = static_cast<char>(bad.back() ^ 1);
      WriteWhole(path, bad);
      auto module = MakeModule({});
      EXPECT_THAT(ReasonOf(Load(*module, "c")), Eq(Reason::kDigestMismatch)) << name;
    }
    WriteWhole(path, bytes);
  }
  EXPECT_EQ(Only(true).verified, true);
}

TEST_F(CheckpointStoreTest, TruncatedFileIsFoundByVerifyAndByLoad) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  for (const char* name : {"model.safetensors", "optimizer.safetensors", "manifest.json"}) {
    const fs::path path = root_ / "c" / name;
    const std::string bytes = ReadWhole(path);
    for (size_t i = 0; i < 34; ++i) {
      WriteWhole(path, bytes.substr(0, bytes.size() * i / 34));
      EXPECT_NE(Only(false).problem, "") << name;
      auto module = MakeModule({});
      const auto loaded = Load(*module, "c");
      EXPECT_EQ(loaded.status().code(), absl::StatusCode::kDataLoss) << name << loaded.status();
    }
    fs::remove(path);
    auto module = MakeModule({});
    EXPECT_FALSE(Load(*module, "c").ok());
    WriteWhole(path, bytes);
  }
}

// A manifest that somebody wrote on purpose has a digest that fits.
TEST_F(CheckpointStoreTest, HostileManifestIsRefusedFieldByField) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  const fs::path path = root_ / "c/manifest.json";
  const std::string text = ReadWhole(path);
  const std::string mark = "\"manifest_xxh3\": \"";
  const auto reseal = [&mark](std::string changed) {
    changed.resize(changed.rfind(mark));
    const uint64_t digest =
        Xxh3(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(changed.data()), changed.size()));
    return absl::StrCat(changed, mark, DigestToHex(digest), "\"\n}\n");
  };
  ASSERT_EQ(reseal(text), text);
  const std::pair<const char*, const char*> changes[] = {
      {"\"format\": \"modelstate checkpoint\"", "\"format\": \"other\""},
      {"\"step\": 1", "\"step\": -1"},
      {"\"step\": 1", "\"step\": 1e400"},
      {"\"step\": 1", "\"step\": [[[[[[[["},
      {"\"module\": \"tiny\"", "\"module\": 3"},
      {"\"metadata\": {", "\"metadata\": {\"x\": {}, "},
      {"\"name\":\"model.safetensors\"", "\"name\":\"../../etc/passwd\""},
      {"\"name\":\"optimizer.safetensors\"", "\"name\":\"model.safetensors\""},
      {"\"kind\":\"buffer\"", "\"kind\":\"gradient\""},
      {"\"kind\":\"buffer\"", "\"kind\":\"parameter\",\"requires_grad\":true"},
      {"\"kind\":\"buffer\"", "\"kind\":\"parameter\",\"requires_grad\":false"},
      {"\"dtype\":\"F32\"", "\"dtype\":\"F33\""},
      {"\"requires_grad\":true,\"xxh3\":\"",
       "\"requires_grad\":true,\"xxh3\":\"123456789abcdef0\",\"x\":\""},
      {"\"shape\":[40,30]", "\"shape\":[40,4611686018427387904,30]"},
      {"\"shape\":[40,30]", "\"shape\":[30,40]"},
      {"\"shape\":[40,30]", "\"shape\":[-40,30]"},
      {"\"name\":\"running_mean\"", "\"name\":\"weight\""},
      {"\"algorithm\":\"adamw\"", "\"algorithm\":\"sgd9\""},
      {"\"lr\":0.01", "\"lr\":\"7ff0000000000000\""},
      {"\"lr\":0.01", "\"lr\":null"},
      {"\"parameter\":\"weight\"", "\"parameter\":\"running_mean\""},
      {"\"slots\":[\"exp_avg\",\"exp_avg_sq\"]", "\"slots\":[\"exp_avg\"]"},
      {"\"slots\":[\"exp_avg\",\"exp_avg_sq\"]", "\"slots\":[0]"},
      {"\"workers\": [", "\"workers\": [{\"worker\": \"w\"}"},
      {"\"workers\": [", "\"workers\": 3, \"x\": ["},
  };
  for (const auto& [from, to] : changes) {
    std::string changed = text;
    const size_t at = changed.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    changed.replace(at, std::string(from).size(), to);
    WriteWhole(path, reseal(changed));
    auto module = MakeModule({});
    const auto loaded = Load(*module, "c");
    EXPECT_FALSE(loaded.ok()) << to;
    EXPECT_TRUE(ReasonOf(loaded).has_value()) << to << ": " << loaded.status();
    EXPECT_EQ(module->state(), ModuleState::kEmpty);
  }
  std::string newer = text;
  newer.replace(newer.find("\"format_version\": 2"), 19, "\"format_version\": 3");
  WriteWhole(path, reseal(newer));
  auto module = MakeModule({});
  EXPECT_THAT(ReasonOf(Load(*module, "c")), Eq(Reason::kCheckpointUnsupported));
  WriteWhole(path, std::string(1000, '['));
  EXPECT_THAT(ReasonOf(Load(*module, "c")), Eq(Reason::kCheckpointCorrupt));
}

TEST_F(CheckpointStoreTest, ListPagesByPathAndLeavesOtherFilesOut) {
  for (const char* path : {"runs/b", "runs/a", "runs/c", "top"}) {
    ASSERT_TRUE(Save(*module_, path).ok());
  }
  fs::copy_file(root_ / "top/model.safetensors", root_ / "runs/plain.safetensors");
  WriteWhole(root_ / "runs/notes.txt", "x");
  WriteWhole(root_ / "runs/broken.pt", "not a zip");
  fs::create_directories(root_ / "runs/x.tmp-0123456789abcdef");
  EXPECT_THAT(Paths(""), ElementsAre("top"));
  EXPECT_THAT(Paths("runs"), ElementsAre("runs/a", "runs/b", "runs/broken.pt", "runs/c",
                                         "runs/plain.safetensors"));
  EXPECT_THAT(Paths("runs", "runs/a", 2), ElementsAre("runs/b", "runs/broken.pt"));
  EXPECT_THAT(Paths("runs", "runs/plain.safetensors"), ElementsAre());
  EXPECT_THAT(ReasonOf(store_->List("nowhere", {})), Eq(Reason::kCheckpointNotFound));
  const auto list = *store_->List("runs", {.after = "runs/b", .verify = true});
  EXPECT_NE(list[0].problem, "");
  EXPECT_EQ(list[0].verified, false);
  EXPECT_EQ(list[2].format, "safetensors");
  EXPECT_EQ(list[2].verified, true);
}

TEST_F(CheckpointStoreTest, RecursiveListGoesInPathOrderAndPagesWithoutGapOrRepeat) {
  const std::vector<std::string> paths = {"a-b/x", "a/deep/er/c", "a/x", "a.b", "a0", "z"};
  for (const std::string& path : paths) ASSERT_TRUE(Save(*module_, path).ok());
  fs::create_directories(root_ / "empty/x.tmp-0123456789abcdef");
  std::vector<std::string> sorted = paths;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(Paths("", "", 100, true), sorted);
  EXPECT_THAT(Paths("a", "", 100, true), ElementsAre("a/deep/er/c", "a/x"));
  EXPECT_THAT(Paths(""), ElementsAre("a.b", "a0", "z"));
  for (size_t limit = 1; limit <= 3; ++limit) {
    std::vector<std::string> all;
    for (std::vector<std::string> page = Paths("", "", limit, true); !page.empty();
         page = Paths("", page.back(), limit, true)) {
      all.insert(all.end(), page.begin(), page.end());
    }
    EXPECT_EQ(all, sorted) << limit;
  }
}

TEST_F(CheckpointStoreTest, LatestIsTheNewestWholeCheckpointBelow) {
  EXPECT_THAT(ReasonOf(store_->Resolve("latest")), Eq(Reason::kCheckpointNotFound));
  EXPECT_THAT(ReasonOf(store_->Resolve("../latest")), Eq(Reason::kInvalidField));
  for (const char* path : {"m/step-00000001", "m/deep/step-00000002", "m/step-00000003"}) {
    ASSERT_TRUE(Save(*module_, path).ok());
    ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
  }
  ASSERT_TRUE(Save(*module_, "other/c").ok());
  EXPECT_EQ(*store_->Resolve("m/latest"), "m/step-00000003");
  EXPECT_EQ(*store_->Resolve("m/deep/latest"), "m/deep/step-00000002");
  EXPECT_EQ(*store_->Resolve("latest"), "other/c");
  EXPECT_EQ(*store_->Resolve("m/step-00000001"), "m/step-00000001");
  EXPECT_EQ(*store_->Resolve("nothing"), "nothing");
  // One that is not whole is no candidate, and neither is a save that a crash cut off.
  fs::remove(root_ / "m/step-00000003/optimizer.safetensors");
  fs::copy(root_ / "other/c", root_ / "m/x.tmp-0123456789abcdef", fs::copy_options::recursive);
  EXPECT_EQ(*store_->Resolve("m/latest"), "m/deep/step-00000002");
  // Links are not followed; something of that very name is meant itself.
  fs::create_directory_symlink("../other/c", root_ / "m/latest");
  EXPECT_EQ(*store_->Resolve("m/latest"), "m/deep/step-00000002");
  fs::remove(root_ / "m/latest");
  fs::copy(root_ / "m/step-00000001", root_ / "m/latest", fs::copy_options::recursive);
  EXPECT_EQ(*store_->Resolve("m/latest"), "m/latest");
}

TEST(RetentionTest, KeepsTheLastAndTheFirstOfEachSoManySteps) {
  std::vector<CheckpointInfo> checkpoints;
  for (uint64_t step : {90, 105, 190, 203, 290, 380, 505}) {
    CheckpointInfo info;
    info.path = PeriodicPath("m", step);
    info.step = step;
    info.create_time = absl::FromUnixSeconds(static_cast<int64_t>(step));
    checkpoints.push_back(info);
  }
  const auto steps_not_kept = [&](RetentionPolicy policy) {
    std::vector<uint64_t> steps;
    for (const std::string& path : NotKept(checkpoints, policy)) {
      steps.push_back(*PeriodicStep(path));
    }
    std::sort(steps.begin(), steps.end());
    return steps;
  };
  EXPECT_THAT(steps_not_kept({}), ElementsAre());
  EXPECT_THAT(steps_not_kept({.keep_last = 7, .keep_every = 0}), ElementsAre());
  EXPECT_THAT(steps_not_kept({.keep_last = 2, .keep_every = 0}),
              ElementsAre(90, 105, 190, 203, 290));
  EXPECT_THAT(steps_not_kept({.keep_last = 1, .keep_every = 100}), ElementsAre(90, 190, 290));
  // Trained on from step 105 once more: what was made last is the newest.
  checkpoints[2].create_time = absl::FromUnixSeconds(1000);
  EXPECT_THAT(steps_not_kept({.keep_last = 1, .keep_every = 0}),
              ElementsAre(90, 105, 203, 290, 380, 505));
}

TEST(RetentionTest, OnlyNamesThatPeriodicSavesGiveArePeriodic) {
  EXPECT_EQ(PeriodicPath("a/b", 1200), "a/b/step-00001200");
  EXPECT_EQ(PeriodicStep("a/b/step-00001200"), 1200u);
  EXPECT_EQ(PeriodicStep("step-123456789"), 123456789u);
  for (const char* path :
       {"step-1200", "step-000001200", "step-0000120x", "step- 0001200", "step-+0001200", "best",
        "step-", "step-00001200-best", "x-step-00001200"}) {
    EXPECT_EQ(PeriodicStep(path), std::nullopt) << path;
  }
}

TEST_F(CheckpointStoreTest, RetentionDeletesPeriodicOnesOfTheModuleInThatDirectoryOnly) {
  const auto push = [&] { ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok()); };
  CheckpointInfo saved;
  for (uint64_t step = 1; step <= 5; ++step) {
    saved = *Save(*module_, PeriodicPath("tiny", step));
    if (step < 5) push();
  }
  for (const char* path : {"tiny/best", "tiny/deep/step-00000001", "tiny/step-00000099"}) {
    ASSERT_TRUE(Save(*module_, path).ok());  // the last is not of step 99
  }
  ASSERT_TRUE(SaveAsOther("tiny/step-00000005.x", {}).ok());
  fs::rename(root_ / "tiny/step-00000005.x", root_ / "tiny/step-00000000");
  fs::resize_file(root_ / "tiny/step-00000002/model.safetensors", 3);  // not ours to judge
  const std::vector<std::string> before = Paths("", "", 100, true);
  std::vector<std::string> deleted;
  ASSERT_TRUE(store_->ApplyRetention(saved, {}, &deleted).ok());
  CheckpointInfo named = saved;
  named.path = "tiny/best";
  ASSERT_TRUE(store_->ApplyRetention(named, {.keep_last = 1, .keep_every = 0}, &deleted).ok());
  EXPECT_EQ(Paths("", "", 100, true), before);
  ASSERT_TRUE(store_->ApplyRetention(saved, {.keep_last = 2, .keep_every = 0}, &deleted).ok());
  EXPECT_THAT(deleted, testing::UnorderedElementsAre("tiny/step-00000001", "tiny/step-00000003"));
  EXPECT_EQ(Paths("", "", 100, true).size(), before.size() - 2);
}

// Somebody forgot --restore: what three weeks of training have left is not for the first save of a
// module of that name to delete.
TEST_F(CheckpointStoreTest, RetentionLeavesWhatAnotherLifeOfTheModuleHasReached) {
  for (uint64_t step = 2; step <= 6; ++step) {
    ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
    if (step < 3) continue;
    ASSERT_TRUE(Save(*module_, PeriodicPath("tiny", step)).ok());
  }
  const auto anew = MakeModule({Parameter("weight", {40, 30}), Buffer("running_mean", {30})});
  ASSERT_TRUE(Configure(*anew, AdamW()).ok());
  const RetentionPolicy last_two = {.keep_last = 2, .keep_every = 0};
  std::vector<std::string> deleted;
  for (uint64_t step = 1; step <= 5; ++step) {
    ASSERT_TRUE(Push(*anew, {{"weight", 1}}).ok());
    const auto saved = Save(*anew, PeriodicPath("tiny", step), {.overwrite = true});
    ASSERT_TRUE(saved.ok()) << saved.status();
    ASSERT_TRUE(store_->ApplyRetention(*saved, last_two, &deleted).ok());
  }
  EXPECT_THAT(Paths("", "", 100, true),
              ElementsAre("tiny/step-00000004", "tiny/step-00000005", "tiny/step-00000006"));
}

TEST_F(CheckpointStoreTest, RetentionLeavesLaterStepsWhereTrainingHasGoneBack) {
  for (uint64_t step = 2; step <= 4; ++step) {
    ASSERT_TRUE(Push(*module_, {{"weight", 1}}).ok());
    ASSERT_TRUE(Save(*module_, PeriodicPath("tiny", step)).ok());
  }
  ASSERT_TRUE(Load(*module_, "tiny/step-00000002").ok());
  std::vector<std::string> deleted;
  ASSERT_TRUE(Push(*module_, {{"weight", 2}}).ok());
  const auto saved = Save(*module_, PeriodicPath("tiny", 3), {.overwrite = true});
  ASSERT_TRUE(saved.ok()) << saved.status();
  ASSERT_TRUE(store_->ApplyRetention(*saved, {.keep_last = 1, .keep_every = 0}, &deleted).ok());
  EXPECT_THAT(deleted, ElementsAre("tiny/step-00000002"));
}

TEST_F(CheckpointStoreTest, APeriodicSaveSetsAsideWhatAnotherLifeOfTheModuleHasSaved) {
  const SaveOptions periodic = {.overwrite = true, .same_module = true};
  ASSERT_TRUE(Save(*module_, "tiny/step-00000001", periodic).ok());
  const auto again = Save(*module_, "tiny/step-00000001", periodic);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->set_aside, "");  // its own
  const Version former = module_->Current()->version;
  const auto anew = MakeModule({Parameter("weight", {40, 30}), Buffer("running_mean", {30})});
  const auto saved = Save(*anew, "tiny/step-00000001", periodic);
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->set_aside, "tiny/step-00000001-of-" + DigestToHex(former.incarnation));
  const auto list = *store_->List("tiny", {.verify = true});
  ASSERT_EQ(list.size(), 2u);
  EXPECT_EQ(list[0].version, anew->Current()->version);
  EXPECT_EQ(list[1].version, former);
  for (const CheckpointInfo& info : list) EXPECT_EQ(info.verified, true) << info.problem;
  // For ever: it has no periodic name.
  std::vector<std::string> deleted;
  ASSERT_TRUE(store_->ApplyRetention(*saved, {.keep_last = 1, .keep_every = 0}, &deleted).ok());
  EXPECT_THAT(deleted, ElementsAre());
}

// Somebody puts a file into a checkpoint, or takes it away, while a save that replaces it runs.
TEST_F(CheckpointStoreTest, WhatHappensToACheckpointWhileItIsReplacedIsNotLost) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  const auto save_beside = [this](const std::function<void()>& act) {
    const auto captured = Capture(*module_);
    const auto report = [&act](const JobProgress& progress) {
      if (progress.phase == "commit") act();
    };
    return store_->Save(*captured, "c", {.overwrite = true}, JobControl(report));
  };
  const auto with_file = save_beside([this] { WriteWhole(root_ / "c/notes.txt", "precious"); });
  ASSERT_TRUE(with_file.ok()) << with_file.status();
  EXPECT_EQ(ReadWhole(root_ / "c/notes.txt"), "precious");
  EXPECT_EQ(Only(true).verified, true);
  EXPECT_EQ(std::distance(fs::directory_iterator(root_), fs::directory_iterator()), 1);
  fs::remove(root_ / "c/notes.txt");
  const auto without = save_beside([this] { fs::remove_all(root_ / "c"); });
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_EQ(Only(true).verified, true);
  // Another server's call waits its turn.
  auto other = *CheckpointStore::Open(root_.string());
  const auto beside = save_beside(
      [&] { EXPECT_THAT(ReasonOf(other->Delete("c")), Eq(Reason::kCheckpointExists)); });
  ASSERT_TRUE(beside.ok()) << beside.status();
  EXPECT_TRUE(other->Delete("c").ok());
}

TEST_F(CheckpointStoreTest, ADeletionThatFailsLeavesTheCheckpointInItsPlace) {
  ASSERT_TRUE(Save(*module_, "runs/c").ok());
  fs::permissions(root_, fs::perms(0755));
  fs::permissions(root_ / "runs", fs::perms(0777));
  fs::permissions(root_ / "runs/c", fs::perms(0555));
  const bool is_root = geteuid() == 0;
  if (is_root) setfsuid(65534);  // root may remove everything
  const absl::Status status = store_->Delete("runs/c");
  if (is_root) setfsuid(0);
  fs::permissions(root_ / "runs/c", fs::perms(0755));
  EXPECT_THAT(ReasonOf(status), Eq(Reason::kStorageError));
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"runs/c\" stays"));
  EXPECT_THAT(Paths("", "", 100, true), ElementsAre("runs/c"));
}

TEST_F(CheckpointStoreTest, ANameThatIsNotUtf8IsAProblemAndHidesNothing) {
  ASSERT_TRUE(Save(*module_, "m/good").ok());
  fs::copy(root_ / "m/good", root_ / "m/bad\xff", fs::copy_options::recursive);
  WriteWhole(root_ / "m/q\xff.pt", "");
  WriteWhole(root_ / "m/q\xff.txt", "");
  EXPECT_THAT(Paths("", "", 100, true), ElementsAre("m/bad\xff", "m/good", "m/q\xff.pt"));
  const auto list = *store_->List("m", {.verify = true});
  EXPECT_THAT(list[0].problem, HasSubstr("not UTF-8"));
  EXPECT_EQ(list[1].verified, true);
  EXPECT_EQ(*store_->Resolve("m/latest"), "m/good");
}

TEST_F(CheckpointStoreTest, SaveOverTheSameModuleOnlyRefusesAnother) {
  SaveOptions options;
  options.overwrite = true;
  options.same_module = true;
  ASSERT_TRUE(Save(*module_, "c", options).ok());
  EXPECT_TRUE(Save(*module_, "c", options).ok());
  EXPECT_THAT(ReasonOf(SaveAsOther("c", options)), Eq(Reason::kCheckpointExists));
  EXPECT_EQ(Only(true).module, "tiny");
}

TEST_F(CheckpointStoreTest, DeleteRemovesCheckpointsOnly) {
  ASSERT_TRUE(Save(*module_, "c").ok());
  fs::create_directories(root_ / "mine");
  WriteWhole(root_ / "notes.txt", "x");
  fs::copy_file(root_ / "c/model.safetensors", root_ / "plain.safetensors");
  for (const char* path : {"mine", "notes.txt", "."}) {
    EXPECT_THAT(ReasonOf(store_->Delete(path)), Eq(Reason::kCheckpointUnsupported)) << path;
  }
  EXPECT_THAT(ReasonOf(store_->Delete("none")), Eq(Reason::kCheckpointNotFound));
  EXPECT_TRUE(store_->Delete("c").ok());
  EXPECT_TRUE(store_->Delete("plain.safetensors").ok());
  EXPECT_THAT(Paths(""), ElementsAre());
  EXPECT_TRUE(fs::exists(root_ / "mine"));
  EXPECT_TRUE(fs::exists(root_ / "notes.txt"));
}

}  // namespace
}  // namespace modelstate
