// Every call of a save, a deletion and a load that touches a file fails once, in each way that it
// can; and disks that are full.

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "common/base/digest.h"
#include "tests/fault/durability/durability_fixture.h"

namespace modelstate::fault {
namespace {

struct Injection {
  Verdict verdict;
  const char* name;
};

bool Creates(const SystemCall& call) {
  uint64_t flags = 0;
  if (call.number != SYS_openat2) return false;
  std::memcpy(&flags, call.ReadBytes(2, sizeof(flags)).data(), sizeof(flags));
  return (flags & O_CREAT) != 0;
}

std::vector<Injection> InjectionsFor(const SystemCall& call) {
  const auto fail = [](int error_number, const char* name) {
    return Injection{{Verdict::kFail, error_number}, name};
  };
  const Injection interrupted = fail(EINTR, "EINTR");
  const Injection io = fail(EIO, "EIO");
  const Injection full = fail(ENOSPC, "ENOSPC");
  const Injection shorter = {{Verdict::kShorten}, "a short one"};
  if (IsWrite(call)) return {io, full, interrupted, shorter};
  if (IsRead(call)) return {io, interrupted, shorter};
  if (IsSync(call)) return {io, full, interrupted};
  const std::string name = CallName(call);
  if (Creates(call)) return {io, full, interrupted, fail(EMFILE, "EMFILE")};
  if (name == "openat2") return {io, interrupted, fail(EMFILE, "EMFILE")};
  if (name == "openat") return {io, fail(EMFILE, "EMFILE")};
  if (name == "fallocate") return {full, interrupted, fail(EOPNOTSUPP, "EOPNOTSUPP")};
  if (name == "mkdirat" || name == "renameat2") return {io, full};
  return {io};
}

// What a child tells of a call that it made.
struct Answer {
  bool told = false;  // what comes after is not disturbed
  bool ok = false;
  bool has_reason = false;
  bool memory_unchanged = false;
  bool next_ok = false;
  uint64_t loaded = 0;  // a digest of what a load gave
  char message[2048] = "";

  void Take(const absl::Status& status) {
    told = true;
    ok = status.ok();
    has_reason = GetReason(status).has_value();
    std::snprintf(message, sizeof(message), "%s", std::string(status.message()).c_str());
  }
};

class InjectedErrorTest : public DurabilityFixture {
 protected:
  struct Change {
    std::string name;
    std::function<void()> prepare;
    std::function<absl::Status()> run;
    int before = kAbsent;
    int after = kAbsent;
  };
  static constexpr char kPath[] = "run/step";

  InjectedErrorTest() {
    void* shared =
        mmap(nullptr, sizeof(Answer), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(shared, MAP_FAILED);
    answer_ = new (shared) Answer();
  }
  ~InjectedErrorTest() override { munmap(answer_, sizeof(Answer)); }

  // Runs `body` with injection `kind` into call `index`; false when there is no such call or kind.
  bool Inject(size_t index, size_t kind, const std::function<void()>& body) {
    *answer_ = Answer();
    call_.clear();
    renamed_ = false;
    size_t seen = 0;
    Observer observer;
    observer.before = [&](const SystemCall& call) -> Verdict {
      if (answer_->told || !TouchesFiles(call)) return {};
      if (seen++ != index) {
        if (call_.empty() && CallName(call) == "renameat2") renamed_ = true;
        return {};
      }
      const std::vector<Injection> injections = InjectionsFor(call);
      if (kind >= injections.size()) return {Verdict::kKill};
      call_ = CallName(call);
      injected_ = injections[kind];
      return injected_.verdict;
    };
    const int exit = RunTraced(
        [&] {
          body();
          return 0;
        },
        observer);
    if (call_.empty()) return false;
    EXPECT_EQ(exit, 0);
    return true;
  }

  bool IsHarmless() const {
    const int error_number = injected_.verdict.error_number;
    return injected_.verdict.kind == Verdict::kShorten || error_number == EINTR ||
           error_number == EOPNOTSUPP;
  }

  void CheckMessage() const {
    EXPECT_TRUE(answer_->has_reason) << answer_->message;
    const bool named = std::strstr(answer_->message, "run") != nullptr ||
                       std::strstr(answer_->message, "\".\"") != nullptr;  // the root
    EXPECT_TRUE(named) << "no name: " << answer_->message;
    EXPECT_NE(std::strpbrk(answer_->message, ";"), nullptr) << "no advice: " << answer_->message;
  }

  // In every call, or in one of `stride`.
  void FailEverywhere(const Change& change, size_t stride = 1) {
    size_t calls = 0;
    size_t injections = 0;
    for (size_t index = 0;; index += stride) {
      size_t kind = 0;
      for (;; ++kind) {
        Clear();
        change.prepare();
        const bool injected = Inject(index, kind, [&] {
          answer_->Take(change.run());
          answer_->memory_unchanged = true;
          for (size_t i = 0; i < states_.size(); ++i) {
            answer_->memory_unchanged &= Fingerprint(states_[i]) == prints_[i];
          }
          answer_->next_ok = SaveState(2, "run/next", false).ok();
        });
        if (!injected) break;
        ++injections;
        SCOPED_TRACE(absl::StrCat(change.name, ": ", injected_.name, " of ", call_, ", call ",
                                  index, ", answers \"", answer_->message, "\""));
        Check(change);
        if (HasFailure()) return;
      }
      if (kind == 0) break;
      ++calls;
    }
    std::printf("%s: %zu calls, %zu injected errors\n", change.name.c_str(), calls, injections);
    EXPECT_GT(injections, stride == 1 ? 20u : 10u);
  }

  void Check(const Change& change) {
    const bool must_fail = !IsHarmless() && (call_ == "pwrite" || call_ == "renameat2" ||
                                             call_ == "fdatasync" || call_ == "fsync");
    EXPECT_FALSE(must_fail && answer_->ok);
    if (!answer_->ok) CheckMessage();
    std::string why;
    const int found = LoadedState(kPath, &why);
    if (answer_->ok) {
      EXPECT_EQ(found, change.after) << why;
    } else if (renamed_) {  // only the sync of the rename, or what comes after, has failed
      EXPECT_TRUE(found == change.before || found == change.after) << found << ": " << why;
    } else {
      EXPECT_EQ(found, change.before) << why;
    }
    EXPECT_TRUE(renamed_ || !HasTemporaries());
    EXPECT_TRUE(answer_->memory_unchanged);
    EXPECT_TRUE(answer_->next_ok);
    EXPECT_EQ(CheckRestart(), "");
    EXPECT_EQ(LoadedState(kPath, &why), found) << why;
    EXPECT_EQ(LoadedState("run/next", &why), 2) << why;
  }

  // Reads all that a checkpoint has, in this thread alone, and digests it.
  absl::Status LoadHere(const ModuleSchema& schema, uint64_t* digest) {
    static const auto ignore = [](const JobProgress&) {};
    const JobControl control(ignore);
    ComputePool alone(1);
    MS_ASSIGN_OR_RETURN(const auto source, CheckpointSource::Open(store_->root(), kPath, ""));
    MS_ASSIGN_OR_RETURN(LoadPlan plan, LoadPlan::Create("tiny", trained_->Current()->schema,
                                                        source->incoming(), LoadOptions()));
    MS_ASSIGN_OR_RETURN(const StagedLoad staged,
                        source->Stage(std::move(plan), device_, *push_budget_, alone, control));
    MS_ASSIGN_OR_RETURN(const std::optional<RestoredState> restored,
                        source->Restore(schema, device_, *push_budget_, control, &alone));
    Xxh3Stream stream;
    for (const auto& storage : staged.storages) stream.Update(storage->HostBytes());
    for (const ParameterState& parameter : restored->optimizer_state.parameters) {
      for (const auto& slot : parameter.slots) {
        if (slot) stream.Update(slot->HostBytes());
      }
    }
    *digest = stream.Digest();
    return absl::OkStatus();
  }

  Answer* answer_ = nullptr;
  std::string call_;  // into which the error went; empty: there was no such call
  Injection injected_{};
  bool renamed_ = false;  // before that call
};

TEST_F(InjectedErrorTest, ASaveWithAFailingCallLeavesTheOldCheckpointAndNoTemporary) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(IsFull() ? 600'000 : 1'000));
  const auto save = [this](int state) { return SaveState(state, kPath, true).status(); };
  FailEverywhere({"a first save", [] {}, [&] { return save(0); }, kAbsent, 0});
  FailEverywhere(
      {"a save over another", [&] { ASSERT_TRUE(save(0).ok()); }, [&] { return save(1); }, 0, 1});
  FailEverywhere({"a deletion", [&] { ASSERT_TRUE(save(0).ok()); },
                  [&] { return store_->Delete(kPath); }, 0, kAbsent});
}

// Of a file of several blocks all but the last are written by another thread.
TEST_F(InjectedErrorTest, ASaveOfSeveralBlocksToADiskWithAFailingCallLeavesTheOldCheckpoint) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  UseDirectory(testing::TempDir());
  ASSERT_NO_FATAL_FAILURE(Train(IsFull() ? 4'000'000 : 1'500'000));
  FailEverywhere({"a save of several blocks", [&] { ASSERT_TRUE(SaveState(0, kPath, true).ok()); },
                  [&] { return SaveState(1, kPath, true).status(); }, 0, 1},
                 IsFull() ? 1 : 4);
}

TEST_F(InjectedErrorTest, ALoadWithAFailingCallSaysSoOrIsEqual) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(IsFull() ? 600'000 : 1'000));
  ASSERT_TRUE(SaveState(1, kPath, false).ok());
  const std::shared_ptr<const ModuleSchema> schema = trained_->Current()->schema;
  uint64_t expected = 0;
  ASSERT_EQ(LoadHere(*schema, &expected), absl::OkStatus());
  size_t injections = 0;
  size_t refused = 0;
  size_t calls = 0;
  for (;; ++calls) {
    size_t kind = 0;
    for (;; ++kind) {
      const bool injected = Inject(calls, kind, [&] {
        answer_->Take(LoadHere(*schema, &answer_->loaded));
        uint64_t again = 0;
        answer_->next_ok = LoadHere(*schema, &again).ok() && again == expected;
      });
      if (!injected) break;
      ++injections;
      SCOPED_TRACE(absl::StrCat(injected_.name, " of ", call_, ", call ", calls, ", answers \"",
                                answer_->message, "\""));
      EXPECT_FALSE(answer_->ok && call_ == "pread" && !IsHarmless());
      if (answer_->ok) {
        EXPECT_EQ(answer_->loaded, expected);
      } else {
        ++refused;
        CheckMessage();
      }
      EXPECT_TRUE(answer_->next_ok);
      if (HasFailure()) return;
    }
    if (kind == 0) break;
  }
  std::printf("a load: %zu calls, %zu injected errors, %zu refused\n", calls, injections, refused);
  EXPECT_GT(refused, 20u);
}

TEST_F(InjectedErrorTest, ADiskThatFillsUpAtAnyMomentLeavesTheOldCheckpoint) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be traced here";
  ASSERT_NO_FATAL_FAILURE(Train(1'000));
  for (size_t index = 0;; ++index) {
    Clear();
    ASSERT_TRUE(SaveState(0, kPath, false).ok());
    *answer_ = Answer();
    size_t seen = 0;
    Observer observer;
    // From that call on nothing that takes space works.
    observer.before = [&](const SystemCall& call) -> Verdict {
      if (!TouchesFiles(call) || seen++ < index) return {};
      const std::string name = CallName(call);
      if (IsWrite(call) || name == "mkdirat" || name == "fallocate" || Creates(call)) {
        return {Verdict::kFail, ENOSPC};
      }
      return {};
    };
    ASSERT_EQ(RunTraced(
                  [&] {
                    answer_->Take(SaveState(1, kPath, true).status());
                    return 0;
                  },
                  observer),
              0);
    SCOPED_TRACE(absl::StrCat("full from call ", index, " on: ", answer_->message));
    std::string why;
    EXPECT_EQ(LoadedState(kPath, &why), answer_->ok ? 1 : 0) << why;
    EXPECT_FALSE(HasTemporaries());
    if (!answer_->ok) {
      EXPECT_NE(std::strstr(answer_->message, "free space"), nullptr);
      CheckMessage();
    }
    if (answer_->ok || HasFailure()) break;
  }
}

// The root gets a file system of its own, which the child alone sees.
TEST_F(InjectedErrorTest, ASaveIntoAFullFileSystemFailsAndTheNextOneSucceeds) {
  if (!CanTrace()) GTEST_SKIP() << "children cannot be made here";
  ASSERT_NO_FATAL_FAILURE(Train(50'000));  // some 600 KB
  enum Exit { kGood, kNoMount, kNotRefused, kTemporary, kOldLost, kNextFailed };
  const auto body = [this]() -> int {
    if (unshare(CLONE_NEWNS) != 0 ||
        mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount("none", root_.c_str(), "tmpfs", 0, "size=1000k") != 0) {
      return kNoMount;
    }
    auto store = CheckpointStore::Open(root_.string());
    if (!store.ok()) return kNoMount;
    store_ = *std::move(store);
    if (!SaveState(0, kPath, false).ok()) return kOldLost;
    const auto full = SaveState(1, kPath, true);
    if (GetReason(full.status()) != Reason::kStorageFull) return kNotRefused;
    if (HasTemporaries()) return kTemporary;
    uint64_t digest = 0;
    if (!LoadHere(*trained_->Current()->schema, &digest).ok()) return kOldLost;
    if (!store_->Delete(kPath).ok() || !SaveState(1, kPath, true).ok()) return kNextFailed;
    return kGood;
  };
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(body());
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == kNoMount) GTEST_SKIP() << "no file system can be mounted here";
  EXPECT_EQ(WEXITSTATUS(status), kGood);
}

}  // namespace
}  // namespace modelstate::fault
