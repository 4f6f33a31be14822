// Workers push through a network that breaks, to a server that is killed and started again from its
// last save. However it went, the state is that of the pushes that were acknowledged, each once.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <set>
#include <thread>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/notification.h"
#include "client/client.h"
#include "client/worker.h"
#include "common/base/status.h"
#include "tests/fault/exactly_once/history.h"
#include "tests/fault/net/chaos_proxy.h"
#include "tests/fault/net/server_process.h"

namespace modelstate::client {
namespace {

constexpr int kWorkers = 8;
constexpr int64_t kRows = 96, kColumns = 64;
constexpr uint64_t kMeanBytes = 200'000;                // between faults: about eight pushes
constexpr absl::Duration kPatience = absl::Minutes(2);  // a server that never comes back
constexpr char kModule[] = "m";
constexpr char kSave[] = "last";

uint64_t Seed() {
  uint64_t seed = 20261125;
  if (const char* text = std::getenv("MODELSTATE_SEED")) {
    EXPECT_TRUE(absl::SimpleAtoi(text, &seed));
  }
  return seed;
}

TensorSpec Spec(const char* name, TensorKind kind, DType dtype, absl::Span<const int64_t> dims) {
  TensorSpec spec;
  spec.name = name;
  spec.kind = kind;
  spec.dtype = dtype;
  spec.shape = *Shape::Create(dims);
  return spec;
}

// Push `index` of `worker`: multiples of 2^-10 below 2^-6, so that no sum of them is rounded, and a
// buffer that says whose push was the last.
struct Push {
  Push(int worker, int index) : last{worker, index} {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(Element(worker, index, i)) / 1024;
    }
  }
  static int64_t Element(int worker, int index, size_t i) {
    return static_cast<int64_t>((static_cast<size_t>(worker) * 7 + static_cast<size_t>(index) * 13 +
                                 i * 5 + i / 31) %
                                17) -
           8;
  }
  std::vector<TensorRef> refs() const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    return {{Spec("weight", TensorKind::kGradient, DType::kF32, {kRows, kColumns}),
             absl::MakeConstSpan(bytes, 4 * kRows * kColumns)},
            {Spec("bias", TensorKind::kGradient, DType::kF32, {kColumns}),
             absl::MakeConstSpan(bytes + 4 * kRows * kColumns, 4 * kColumns)},
            {Spec("last_push", TensorKind::kBuffer, DType::kI64, {2}),
             absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(last.data()), 16)}};
  }
  std::vector<float> values = std::vector<float>(kRows * kColumns + kColumns);
  std::array<int64_t, 2> last;
};

class ExactlyOnceTest : public testing::TestWithParam<Algorithm> {
 protected:
  ExactlyOnceTest() {
    const bool full = std::getenv("MODELSTATE_FULL") != nullptr;
    steps_ = full ? 1000 : 60;
    kills_ = full ? 20 : 2;
    root_ = std::filesystem::path(testing::TempDir()) / absl::StrCat("exactly_once_", getpid());
    std::filesystem::remove_all(root_);
  }
  ~ExactlyOnceTest() override {
    server_.reset();
    std::filesystem::remove_all(root_);
  }

  void StartServer() {
    absl::StatusOr<std::unique_ptr<ServerProcess>> server = ServerProcess::Start(root_.string());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    proxy_.SetTarget(server_->port());
  }
  static Client Connect(const std::string& address) {
    ClientOptions options;
    options.max_attempts = 3;
    options.initial_backoff = absl::Milliseconds(2);
    options.max_backoff = absl::Milliseconds(50);
    // The first connection through the proxy may break as any other.
    while (true) {
      absl::StatusOr<Client> client = Client::Connect(address, options);
      if (client.ok()) return *std::move(client);
    }
  }
  void Create(const Client& client, const std::string& module, Version* version) {
    const std::vector<TensorSpec> specs = {
        Spec("weight", TensorKind::kParameter, DType::kF32, {kRows, kColumns}),
        Spec("bias", TensorKind::kParameter, DType::kF32, {kColumns}),
        Spec("last_push", TensorKind::kBuffer, DType::kI64, {2})};
    const absl::StatusOr<ModuleInfo> created = client.CreateModule(module, specs);
    ASSERT_TRUE(created.ok()) << created.status();
    *version = created->version;
    OptimizerConfig config;
    config.algorithm = GetParam();
    config.hyperparameters.lr = GetParam() == Algorithm::kSgd ? 0.5 : 0.01;
    const auto configured = client.ConfigureOptimizer(module, config);
    ASSERT_TRUE(configured.ok()) << configured.status();
  }

  void Save() {
    SaveCheckpointOptions options;
    options.overwrite = true;
    const auto saved = Connect(server_->address()).SaveCheckpoint(kModule, kSave, options);
    ASSERT_TRUE(saved.ok()) << saved.status();
  }
  // Kills the server while it writes the next save, which is then either whole or not there.
  void KillInASave() {
    absl::Notification begun;
    std::thread save([this, &begun, client = Connect(server_->address())] {
      SaveCheckpointOptions options;
      options.overwrite = true;
      bool told = false;
      (void)client.SaveCheckpoint(kModule, kSave, options, [&](const Progress&) {
        if (!std::exchange(told, true)) begun.Notify();
      });
      if (!told) begun.Notify();
    });
    begun.WaitForNotification();
    server_->Kill();
    save.join();
  }
  void Restart() {
    ASSERT_NO_FATAL_FAILURE(StartServer());
    LoadCheckpointOptions options;
    options.create_module = true;
    const auto loaded = Connect(server_->address()).LoadCheckpoint(kModule, kSave, options);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    ASSERT_TRUE(loaded->optimizer_loaded);
    history_.BeginLife(loaded->load.module.version, loaded->load.module.step);
  }

  void Record(int worker, int index, const StepResult& result) {
    EXPECT_EQ(result.outcome, StepOutcome::kApplied);
    history_.Add({worker, index, result.version, result.step, result.replayed});
  }

  // Uses Worker, and after a restart goes on with the weights that the save had: what was lost
  // stays lost.
  void GoOn(int w) {
    WorkerOptions options;
    options.initial_backoff = absl::Milliseconds(2);
    options.max_backoff = absl::Milliseconds(100);
    options.patience = kPatience;
    Worker worker(Connect(proxy_.address(2 * w)), kModule, absl::StrCat("worker-", w), options);
    for (int index = 1; index <= steps_; ++index) {
      const Push push(w, index);
      if (index % 10 == 1) {
        const absl::StatusOr<StateDict> weights = worker.Fetch();
        ASSERT_TRUE(weights.ok()) << weights.status();
      }
      absl::StatusOr<StepResult> result = worker.Push(push.refs());
      while (GetReason(result.status()) == Reason::kIncarnationChanged) {
        const absl::StatusOr<StateDict> weights = worker.Fetch();
        ASSERT_TRUE(weights.ok()) << weights.status();
        result = worker.Push(push.refs());
      }
      ASSERT_TRUE(result.ok()) << result.status();
      Record(w, index, *result);
    }
  }

  // A caller with retries of its own, which numbers its pushes by itself; after a restart it asks
  // for its last sequence and makes all pushes after that again. Of some it sends two copies at
  // once.
  void MakeAgain(int w) {
    const std::array<Client, 2> clients = {Connect(proxy_.address(2 * w)),
                                           Connect(proxy_.address(2 * w + 1))};
    StepOptions options;
    options.worker = absl::StrCat("worker-", w);
    const auto look = [&](int* next) {
      const auto state = Patiently<StateDict>([&](bool) { return clients[0].Fetch(kModule); });
      ASSERT_TRUE(state.ok()) << state.status();
      options.base = state->version();
      const absl::StatusOr<int> last = LastIndex(clients[0], options.worker);
      ASSERT_TRUE(last.ok()) << last.status();
      *next = *last + 1;
    };
    int index = 0;
    ASSERT_NO_FATAL_FAILURE(look(&index));
    while (true) {
      if (index > steps_) {
        no_more_kills_.WaitForNotification();
        ASSERT_NO_FATAL_FAILURE(look(&index));
        if (index > steps_) return;
      }
      const Push push(w, index);
      options.sequence = static_cast<uint64_t>(index);
      std::array<absl::StatusOr<StepResult>, 2> results;
      const auto send = [&](size_t copy) {
        results[copy] = Patiently<StepResult>([&, options](bool again) mutable {
          options.resend = again;
          return clients[copy].ApplyStep(kModule, push.refs(), options);
        });
      };
      const bool twice = index % 4 == 0;
      std::thread other;
      if (twice) other = std::thread(send, 1);
      send(0);
      if (twice) other.join();
      bool lost = false;
      for (size_t copy = 0; copy < (twice ? 2 : 1); ++copy) {
        if (GetReason(results[copy].status()) == Reason::kIncarnationChanged) {
          lost = true;
          continue;
        }
        ASSERT_TRUE(results[copy].ok()) << "push " << index << ": " << results[copy].status();
        Record(w, index, *results[copy]);
      }
      if (lost) {
        ASSERT_NO_FATAL_FAILURE(look(&index));
      } else {
        ++index;
      }
    }
  }

  // Until the server can be reached and has its module again.
  template <typename T>
  static absl::StatusOr<T> Patiently(const std::function<absl::StatusOr<T>(bool again)>& call) {
    const absl::Time deadline = absl::Now() + kPatience;
    for (bool again = false;; again = true) {
      absl::StatusOr<T> result = call(again);
      const std::optional<Reason> reason = GetReason(result.status());
      const bool comes_back = absl::IsUnavailable(result.status()) ||
                              reason == Reason::kModuleNotFound || reason == Reason::kModuleEmpty ||
                              reason == Reason::kNoOptimizer;
      if (!comes_back || absl::Now() > deadline) return result;
    }
  }

  // What the server has last of a worker; 0: nothing.
  static absl::StatusOr<int> LastIndex(const Client& client, const std::string& worker) {
    const auto first =
        Patiently<StepResult>([&](bool) { return client.ReplayStep(kModule, worker, 1); });
    if (first.ok()) return 1;
    if (GetReason(first.status()) == Reason::kStepNotSeen) return 0;
    int last = 0;
    if (GetReason(first.status()) != Reason::kSequenceReused ||
        !absl::SimpleAtoi(GetErrorMetadata(first.status())["last_sequence"], &last)) {
      return first.status();
    }
    return last;
  }

  // The pushes one after the other on a module of its own must give the same bits, those of the
  // optimizer's state included.
  void CompareWithReplay(const Client& client, const std::vector<Acknowledgement>& surviving) {
    Version version;
    ASSERT_NO_FATAL_FAILURE(Create(client, "replay", &version));
    for (const Acknowledgement& a : surviving) {
      const auto step = client.ApplyStep("replay", Push(a.worker, a.index).refs(), {});
      ASSERT_TRUE(step.ok()) << step.status();
    }
    const absl::StatusOr<StateDict> got = client.Fetch(kModule);
    const absl::StatusOr<StateDict> want = client.Fetch("replay");
    ASSERT_TRUE(got.ok()) << got.status();
    ASSERT_TRUE(want.ok()) << want.status();
    EXPECT_EQ(got->step(), surviving.size()) << "steps applied";
    EXPECT_EQ(want->step(), surviving.size());
    ASSERT_EQ(got->size(), want->size());
    for (size_t i = 0; i < got->size(); ++i) {
      EXPECT_TRUE(got->bytes(i) == want->bytes(i)) << DisplayName(got->specs()[i]) << " differs";
    }
    EXPECT_EQ(OptimizerDigests(client, kModule), OptimizerDigests(client, "replay"));
    if (GetParam() == Algorithm::kSgd) CompareWithSum(*got, surviving);
  }

  static std::vector<std::string> OptimizerDigests(const Client& client,
                                                   const std::string& module) {
    ListOptions options;
    options.digests = true;
    const absl::StatusOr<TensorList> list = client.ListOptimizerState(module, options);
    EXPECT_TRUE(list.ok()) << list.status();
    std::vector<std::string> digests;
    if (!list.ok()) return digests;
    for (const TensorInfo& tensor : list->tensors) {
      digests.push_back(absl::StrCat(DisplayName(tensor.spec), " ", tensor.xxh3.value_or(0)));
    }
    return digests;
  }

  // The same without a server: the order does not matter where nothing is rounded.
  static void CompareWithSum(const StateDict& got, const std::vector<Acknowledgement>& surviving) {
    std::vector<int64_t> sum(kRows * kColumns + kColumns);
    for (const Acknowledgement& a : surviving) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += Push::Element(a.worker, a.index, i);
    }
    std::vector<float> weights(sum.size());
    const absl::Span<const uint8_t> weight = got.bytes(*got.Find("weight"));
    const absl::Span<const uint8_t> bias = got.bytes(*got.Find("bias"));
    std::memcpy(weights.data(), weight.data(), weight.size());
    std::memcpy(weights.data() + weight.size() / 4, bias.data(), bias.size());
    size_t wrong = 0;
    for (size_t i = 0; i < sum.size(); ++i) {
      if (weights[i] != -static_cast<float>(sum[i]) / 2048) ++wrong;
    }
    EXPECT_EQ(wrong, 0u) << "elements differ from the sum of the gradients";
  }

  int steps_ = 0;
  int kills_ = 0;
  std::filesystem::path root_;
  ChaosProxy proxy_{Seed(), 2 * kWorkers, kMeanBytes};
  std::unique_ptr<ServerProcess> server_;
  History history_;
  absl::Notification no_more_kills_;
};

TEST_P(ExactlyOnceTest, StateIsWhatWasAcknowledgedFromTheSaveOn) {
  SCOPED_TRACE(absl::StrCat("MODELSTATE_SEED=", Seed()));
  ASSERT_NO_FATAL_FAILURE(StartServer());
  Version first;
  ASSERT_NO_FATAL_FAILURE(Create(Connect(server_->address()), kModule, &first));
  history_.BeginLife(first, 0);
  ASSERT_NO_FATAL_FAILURE(Save());

  std::vector<std::thread> workers;
  for (int w = 0; w < kWorkers; ++w) {
    workers.emplace_back([this, w] {
      if (w % 2 == 0) {
        GoOn(w);
      } else {
        MakeAgain(w);
      }
      if (HasFailure()) history_.GiveUp();
    });
  }
  const uint64_t all = static_cast<uint64_t>(kWorkers) * static_cast<uint64_t>(steps_);
  const uint64_t between = all / static_cast<uint64_t>(kills_ + 1);
  for (int kill = 1; kill <= kills_ && !HasFailure(); ++kill) {
    // A save, then more pushes, of which the kill takes what was acknowledged since.
    history_.AwaitCount(static_cast<uint64_t>(kill) * between - between / 3);
    Save();
    history_.AwaitCount(static_cast<uint64_t>(kill) * between);
    if (kill % 2 == 0) {
      KillInASave();
    } else {
      server_->Kill();
    }
    Restart();
  }
  no_more_kills_.Notify();
  for (std::thread& worker : workers) worker.join();
  ASSERT_FALSE(HasFailure());

  std::vector<std::string> problems;
  const std::vector<Acknowledgement> surviving = history_.Surviving(&problems);
  EXPECT_TRUE(problems.empty()) << absl::StrJoin(problems, "\n");
  const auto [saved, since] = history_.LastLife();
  EXPECT_EQ(saved + since, surviving.size()) << "the last save's steps, and those since";
  absl::flat_hash_map<int, int> by_worker;
  for (const Acknowledgement& a : surviving) ++by_worker[a.worker];
  for (int w = 1; w < kWorkers; w += 2) EXPECT_EQ(by_worker[w], steps_) << "worker " << w;
  CompareWithReplay(Connect(server_->address()), surviving);

  for (size_t kind = 0; kind < kFaultKinds; ++kind) {
    EXPECT_GT(proxy_.faults(static_cast<Fault>(kind)), 0u) << "fault " << kind << " never struck";
  }
  std::printf(
      "%zu pushes in the state (%llu in the last save, %llu since), %llu acknowledged, "
      "%llu of them by a replayed answer; %d kills; %llu connections, %llu cut, %llu "
      "answers lost, %llu late copies, %llu silences\n",
      surviving.size(), static_cast<unsigned long long>(saved),
      static_cast<unsigned long long>(since), static_cast<unsigned long long>(history_.count()),
      static_cast<unsigned long long>(history_.replayed()), kills_,
      static_cast<unsigned long long>(proxy_.connections()),
      static_cast<unsigned long long>(proxy_.faults(Fault::kCut)),
      static_cast<unsigned long long>(proxy_.faults(Fault::kAnswerLost)),
      static_cast<unsigned long long>(proxy_.faults(Fault::kLateCopy)),
      static_cast<unsigned long long>(proxy_.faults(Fault::kSilence)));
}

INSTANTIATE_TEST_SUITE_P(Rules, ExactlyOnceTest,
                         testing::Values(Algorithm::kSgd, Algorithm::kAdamW),
                         [](const auto& info) { return std::string(AlgorithmName(info.param)); });

}  // namespace
}  // namespace modelstate::client
