#ifndef MODELSTATE_TESTS_FAULT_DURABILITY_DURABILITY_FIXTURE_H_
#define MODELSTATE_TESTS_FAULT_DURABILITY_DURABILITY_FIXTURE_H_

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/fault/durability/syscall_tracer.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate::fault {

// Whether the long forms of the tests are asked for.
inline bool IsFull() { return std::getenv("MODELSTATE_FULL") != nullptr; }

// Several states of one module in training, and a root in memory (/dev/shm) whose checkpoints are
// told apart by every bit that a load brings back.
class DurabilityFixture : public CheckpointFixture {
 protected:
  static constexpr int kStates = 3;
  static constexpr int kAbsent = -1;
  static constexpr int kBad = -2;

  DurabilityFixture() { UseDirectory("/dev/shm"); }

  // Puts the root there: on a disk, where saves go past the page cache if it has O_DIRECT.
  void UseDirectory(const std::string& directory) {
    std::filesystem::remove_all(root_);
    std::string pattern = absl::StrCat(directory, "/modelstate-durability-XXXXXX");
    if (mkdtemp(pattern.data()) != nullptr) root_ = pattern;
    Clear();
  }

  // `elements` of the largest parameter.
  void Train(int64_t elements) {
    trained_ = MakeModule({Parameter("weight", {elements}), Parameter("bias", {50}),
                           Parameter("half", {33}, DType::kBF16), Buffer("running_mean", {50})});
    ASSERT_TRUE(Configure(*trained_, AdamW()).ok());
    for (int i = 0; i < kStates; ++i) {
      StepRequest request;
      request.worker = "w";
      request.sequence = static_cast<uint64_t>(i) + 1;
      ASSERT_TRUE(
          Push(*trained_, {{"weight", 1}, {"bias", -1}, {"half", 0.5F}}, std::move(request)).ok());
      states_.push_back(*Capture(*trained_));
      prints_.push_back(Fingerprint(states_.back()));
    }
  }

  void Clear() {
    std::filesystem::remove_all(root_);
    std::filesystem::create_directories(root_);
    Reopen();
  }
  // As a start of the server does.
  void Reopen() {
    auto store = CheckpointStore::Open(root_.string());
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  absl::StatusOr<CheckpointInfo> SaveState(int state, const std::string& path,
                                           bool overwrite) const {
    static const auto ignore = [](const JobProgress&) {};
    SaveOptions options;
    options.overwrite = overwrite;
    return store_->Save(states_[static_cast<size_t>(state)], path, options, JobControl(ignore));
  }

  // Everything that a checkpoint keeps, to be compared bit for bit.
  static std::string Fingerprint(const CapturedState& state) {
    std::string print = absl::StrCat("step ", state.snapshot->step, "\n");
    for (const auto& [name, bytes] : Contents(*state.snapshot)) {
      absl::StrAppend(&print, name, "=", bytes, "\n");
    }
    for (const ParameterState& parameter : state.optimizer_state.parameters) {
      absl::StrAppend(&print, parameter.step, " ", parameter.product, "\n");
      for (const auto& slot : parameter.slots) {
        absl::StrAppend(&print, slot ? Bytes(slot) : "none", "\n");
      }
    }
    for (const auto& [worker, record] : state.workers) {
      absl::StrAppend(&print, worker, " ", record.sequence, " ", record.payload_digest, " ",
                      record.answer.step, "\n");
    }
    return print;
  }

  // Which state a load of `path` brings back; kAbsent where there is nothing at all.
  int LoadedState(const std::string& path, std::string* why = nullptr) {
    auto module = MakeModule({});
    const auto loaded = Load(*module, path);
    if (!loaded.ok()) {
      if (why != nullptr) *why = loaded.status().ToString();
      return std::filesystem::exists(root_ / path) ? kBad : kAbsent;
    }
    const std::string print = Fingerprint(*Capture(*module));
    for (int i = 0; i < kStates; ++i) {
      if (print == prints_[static_cast<size_t>(i)]) return i;
    }
    if (why != nullptr) *why = "it loads as something that was never saved";
    return kBad;
  }

  // What a start of the server after a crash must find: a store without temporaries that lists
  // nothing but whole checkpoints. Empty, or what is wrong.
  std::string CheckRestart() {
    auto store = CheckpointStore::Open(root_.string());
    if (!store.ok()) return store.status().ToString();
    store_ = *std::move(store);
    if (HasTemporaries()) return "a start of the server left temporaries";
    ListOptions options;
    options.verify = true;
    options.recursive = true;
    const auto listed = store_->List(".", options);
    if (!listed.ok()) return listed.status().ToString();
    for (const CheckpointInfo& info : *listed) {
      if (info.verified != true) return absl::StrCat(info.path, " is listed: ", info.problem);
    }
    return "";
  }

  bool HasTemporaries() const {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root_)) {
      if (entry.path().filename().string().find(".tmp-") != std::string::npos) return true;
    }
    return false;
  }

  std::shared_ptr<ModuleInstance> trained_;
  std::vector<CapturedState> states_;
  std::vector<std::string> prints_;
};

}  // namespace modelstate::fault

#endif  // MODELSTATE_TESTS_FAULT_DURABILITY_DURABILITY_FIXTURE_H_
