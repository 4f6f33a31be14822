// What the server does with checkpoints by itself: periodic saves, retention, restoring at the
// start.
#include <gmock/gmock.h>

#include <fstream>

#include "absl/strings/str_join.h"
#include "tests/server/rpc/checkpoint_calls.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;
using Stub = v1::ModelState::Stub;
using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

class PeriodicSavesTest : public CheckpointCalls {
 protected:
  PeriodicSavesTest() {
    options_.log = [this](absl::LogSeverity, const std::string& text) {
      absl::MutexLock lock(&mutex_);
      log_.push_back(text);
    };
  }
  ~PeriodicSavesTest() override { server_.reset(); }

  void SetUp() override {}  // each test starts the server with flags of its own

  // Waits until so many messages of the log have this text.
  void WaitForLog(const std::string& text, size_t count = 1) {
    const auto there = [this, &text, count] {
      mutex_.AssertReaderHeld();
      size_t found = 0;
      for (const std::string& line : log_) found += line.find(text) != std::string::npos;
      return found >= count;
    };
    absl::MutexLock lock(&mutex_);
    ASSERT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(20)))
        << text << " is not in:\n"
        << absl::StrJoin(log_, "\n");
  }
  std::vector<std::string> Log() {
    absl::MutexLock lock(&mutex_);
    return log_;
  }

  void Step(const std::string& module = "tiny") {
    const auto pushed =
        Push(StepParts(module, {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, -1})}}));
    ASSERT_TRUE(pushed.ok()) << pushed.status();
  }
  std::vector<std::string> Paths() {
    v1::ListCheckpointsRequest list;
    list.set_recursive(true);
    list.set_verify(true);
    std::vector<std::string> paths;
    const auto response = Call(&Stub::ListCheckpoints, list);
    EXPECT_TRUE(response.ok()) << response.status();
    for (const v1::Checkpoint& checkpoint : response->checkpoints()) {
      paths.push_back(checkpoint.path());
      EXPECT_TRUE(checkpoint.verified()) << checkpoint.problem();
    }
    return paths;
  }

  absl::Mutex mutex_;
  std::vector<std::string> log_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(PeriodicSavesTest, EveryFewStepsEachModuleIsSavedAndOldOnesGo) {
  options_.save_every.steps = 2;
  options_.retention = {.keep_last = 1, .keep_every = 4};
  StartServer();
  CreateTiny();
  CreateTiny("runs/other");
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.1).ok());
  for (size_t saves = 1; saves <= 4; ++saves) {
    Step();
    Step();
    WaitForLog("module \"tiny\" is saved", saves);
  }
  WaitForLog("\"tiny/step-00000006\" is deleted");
  EXPECT_THAT(Paths(), ElementsAre("tiny/step-00000004", "tiny/step-00000008"));
  EXPECT_EQ(Info().periodic_saves().saved(), 4);
  EXPECT_EQ(Info().periodic_saves().failed(), 0);
}

TEST_F(PeriodicSavesTest, AnIntervalSavesWhatHasChangedAndIsNotSavedYet) {
  options_.save_every.interval = absl::Milliseconds(1);
  StartServer();
  CreateTiny();
  WaitForLog("saved to \"tiny/step-00000000\"");
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.1).ok());
  Step();
  WaitForLog("saved to \"tiny/step-00000001\"");
  CreateTiny("later");
  WaitForLog("saved to \"later/step-00000000\"");
  // Everything is saved by now: the looks that the third save has waited for begin no more.
  EXPECT_THAT(Paths(),
              ElementsAre("later/step-00000000", "tiny/step-00000000", "tiny/step-00000001"));
}

TEST_F(PeriodicSavesTest, ASaveThatFailsIsLoggedAndCountedAndTheNextGoesOn) {
  options_.save_every.steps = 1;
  StartServer();
  std::ofstream(root_ / "tiny") << "a file in the way";
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.1).ok());
  Step();
  WaitForLog("module \"tiny\" is not saved");
  EXPECT_EQ(Info().periodic_saves().failed(), 1);
  EXPECT_THAT(Info().periodic_saves().last_error(), HasSubstr("\"tiny\""));
  fs::remove(root_ / "tiny");
  Step();
  WaitForLog("module \"tiny\" is saved to \"tiny/step-00000002\"");
  EXPECT_EQ(Info().periodic_saves().saved(), 1);
}

TEST_F(PeriodicSavesTest, ServerWithoutThemSaysSo) {
  StartServer();
  EXPECT_FALSE(Info().has_periodic_saves());
}

class RestoreTest : public PeriodicSavesTest {
 protected:
  void Save(const std::string& module, const std::string& path, bool weights_only = false) {
    v1::SaveCheckpointRequest request;
    request.set_module(module);
    request.set_path(path);
    request.set_weights_only(weights_only);
    grpc::ClientContext context;
    auto reader = stub_->SaveCheckpoint(&context, request);
    v1::SaveCheckpointResponse event;
    while (reader->Read(&event)) {
    }
    const grpc::Status status = reader->Finish();
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  void Restart() {
    server_.reset();
    options_.restore_latest = true;
    StartServer();
  }
  uint64_t StepOf(const std::string& module) {
    v1::GetModuleRequest request;
    request.set_module(module);
    const auto found = Call(&Stub::GetModule, request);
    EXPECT_TRUE(found.ok()) << found.status();
    return found.ok() ? found->step() : ~uint64_t{0};
  }
  void Damage(const std::string& file) {
    std::fstream stream(root_ / file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekp(-1, std::ios::end);
    const int last = stream.peek();
    stream.put(static_cast<char>(last ^ 1));
  }
};

TEST_F(RestoreTest, ModulesComeBackFromTheNewestThatLoadsAndEachSkipIsTold) {
  StartServer();
  CreateTiny();
  CreateTiny("runs/b");
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.1).ok());
  for (int step = 1; step <= 4; ++step) {
    Step();
    Save("tiny", absl::StrCat("tiny/step-0000000", step));
    if (step == 2) Step("tiny"), Save("tiny", "tiny/named");
  }
  Save("runs/b", "elsewhere/b");
  Save("tiny", "export", /*weights_only=*/true);
  const std::string region = FetchAll("tiny").Region();
  Damage("tiny/step-00000004/model.safetensors");
  fs::remove(root_ / "tiny/step-00000003/manifest.json");
  fs::create_directories(root_ / "tiny/step-00000005.tmp-0123456789abcdef");
  Restart();
  EXPECT_EQ(StepOf("tiny"), 3u);  // of tiny/named
  EXPECT_EQ(StepOf("runs/b"), 0u);
  EXPECT_THAT(Log(), Contains(AllOf(HasSubstr("\"tiny/step-00000004\""), HasSubstr("passed over"),
                                    HasSubstr("XXH3"))));
  EXPECT_THAT(Log(), Contains(AllOf(HasSubstr("\"tiny/step-00000003\""), HasSubstr("passed over"),
                                    HasSubstr("manifest.json"))));
  EXPECT_THAT(Log(), Contains(AllOf(HasSubstr("\"tiny\" from \"tiny/named\", step 3"))));
  // Training goes on where it was: with its optimizer.
  Step();
  EXPECT_EQ(StepOf("tiny"), 4u);
}

TEST_F(RestoreTest, WeightsAloneComeBackOnlyWhereNothingElseLoads) {
  StartServer();
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.1).ok());
  Step();
  Save("tiny", "full");
  Step();
  Save("tiny", "weights", /*weights_only=*/true);
  Restart();
  EXPECT_EQ(StepOf("tiny"), 1u);
  Damage("full/optimizer.safetensors");
  Restart();
  EXPECT_EQ(StepOf("tiny"), 0u);
  EXPECT_THAT(Log(), Contains(HasSubstr("weights only")));
  Damage("weights/model.safetensors");
  Restart();
  EXPECT_EQ(Info().module_count(), 0);
  EXPECT_THAT(Log(), Contains(HasSubstr("\"tiny\" is left out")));
}

TEST_F(RestoreTest, AModuleOfWhichEveryCheckpointIsCutOffIsNamed) {
  StartServer();
  CreateTiny();
  CreateTiny("whole");
  for (const char* path : {"a", "b"}) {
    Save("tiny", path);
    fs::resize_file(root_ / path / "model.safetensors", 100);
  }
  Save("whole", "c");
  Restart();
  EXPECT_EQ(Info().module_count(), 1);
  EXPECT_THAT(Log(), Contains(AllOf(HasSubstr("\"a\""), HasSubstr("100 bytes"))));
  EXPECT_THAT(Log(), Contains(HasSubstr("\"tiny\" is left out: none of its 2 checkpoints loads")));
}

TEST_F(RestoreTest, AStartWithoutItTellsWhatPeriodicSavesWouldTakeThePlaceOf) {
  options_.save_every.steps = 100;
  StartServer();
  CreateTiny();
  Save("tiny", "tiny/step-00000000");
  Save("tiny", "named");
  EXPECT_THAT(Log(), Not(Contains(HasSubstr("from before this start"))));
  Restart();
  EXPECT_THAT(Log(), Not(Contains(HasSubstr("from before this start"))));
  server_.reset();
  options_.restore_latest = false;
  StartServer();
  EXPECT_THAT(Log(), Contains(AllOf(HasSubstr("checkpoints of \"tiny\" from before this start"),
                                    HasSubstr("--restore=latest"))));
}

TEST_F(RestoreTest, AClosedDirectoryIsTold) {
  StartServer();
  fs::create_directory_symlink("/", root_ / "mounted");
  Restart();
  EXPECT_THAT(Log(),
              Contains(AllOf(HasSubstr("\"mounted\" is passed over"), HasSubstr("symbolic link"))));
}

TEST_F(RestoreTest, LatestLoadsTheNewestAndTellsWhichItWas) {
  StartServer();
  CreateTiny();
  Save("tiny", "tiny/a");
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.1).ok());
  Step();
  Save("tiny", "tiny/b");
  const auto loaded = LoadFile(LoadRequest("copy", "tiny/latest", true));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->path(), "tiny/b");
  EXPECT_EQ(StepOf("copy"), 1u);
  EXPECT_THAT(LoadFile(LoadRequest("copy", "none/latest", true)),
              FailsWith(Reason::kCheckpointNotFound));
}

}  // namespace
}  // namespace modelstate
