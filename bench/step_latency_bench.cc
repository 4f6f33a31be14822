// How long a step takes while readers stream, or while saves follow one another, apart from the
// network: gradients are staged, then ApplyStep is timed; readers make all messages of
// StreamStateDict and drop them; saves go to a folder of their own in DIR.
//
//   build/release/bin/step_latency_bench [--device=cuda:0] [--bytes=268435456] [--readers=32]
//   build/release/bin/step_latency_bench --save_to=DIR

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "bench/payload.h"
#include "bench/support.h"
#include "common/base/status.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/module/module_instance.h"
#include "server/rpc/state_stream.h"

ABSL_FLAG(std::string, device, "cpu", "where the module is");
ABSL_FLAG(uint64_t, bytes, uint64_t{256} << 20, "of parameters, in mixed tensors, under AdamW");
ABSL_FLAG(int, readers, 32, "that stream in every other turn");
ABSL_FLAG(std::string, save_to, "",
          "a directory on the disk that saves go to, in place of readers");
ABSL_FLAG(int, steps, 100, "in a turn");
ABSL_FLAG(int, rounds, 5, "turns of each kind");

namespace modelstate {
namespace {

class Bench {
 public:
  Bench()
      : device_(OrDie(MakeDevice(absl::GetFlag(FLAGS_device), 0))),
        snapshots_(std::make_shared<MemoryBudget>(Reason::kSnapshotLimit, "", "", UINT64_MAX / 2)),
        pushes_(std::make_shared<MemoryBudget>(Reason::kPushMemory, "", "", UINT64_MAX / 2)) {
    const auto schema = OrDie(ModuleSchema::Create(MixedTensors(absl::GetFlag(FLAGS_bytes)), 1));
    std::vector<StorageRef> storages;
    for (const TensorSpec& spec : schema->specs()) {
      RefPtr<TensorStorage> storage = OrDie(TensorStorage::Allocate(*device_, spec.nbytes()));
      OrDie(device_->FillZero(storage->MutableBuffer()));
      storages.push_back(std::move(storage));
    }
    ModuleEnvironment environment{
        device_.get(), &compute_, &strands_, snapshots_, pushes_, WorkerLimits(), [] {
          return absl::Now();
        }};
    module_ = std::make_shared<ModuleInstance>("bench", environment, schema, std::move(storages),
                                               ModuleMetadata());
    OptimizerConfig config;
    config.algorithm = Algorithm::kAdamW;
    config.max_grad_norm = 1;
    absl::Notification done;
    module_->ConfigureOptimizer(config, false, [&](const auto& result) {
      OrDie(result.status());
      done.Notify();
    });
    done.WaitForNotification();
  }
  ~Bench() { strands_.join(); }

  // Seconds of one step; its gradients are zero.
  double Step() {
    const VersionRef current = module_->Current();
    std::vector<PushedTensor> table;
    for (const TensorSpec& spec : current->schema->specs()) {
      table.push_back({spec.name, TensorKind::kGradient, spec.dtype, spec.shape});
    }
    StepRequest request;
    request.gradients =
        OrDie(StageGradients(current->schema, std::move(table), *device_, *pushes_));
    for (GradientSet::Entry& entry : request.gradients->entries) {
      OrDie(device_->FillZero(entry.storage->MutableBuffer()));
    }
    absl::Notification done;
    const double begin = Now();
    double end = 0;
    module_->ApplyStep(std::move(request), [&](absl::StatusOr<StepAnswer> answer) {
      end = Now();
      OrDie(answer.status());
      done.Notify();
    });
    done.WaitForNotification();
    return end - begin;
  }

  // Streams snapshots until `stop`.
  void Read(const std::atomic<bool>& stop, std::atomic<uint64_t>& bytes) {
    while (!stop) {
      StateStream::Contents contents;
      contents.snapshot = OrDie(module_->Hold());
      contents.view = OrDie(contents.snapshot->schema->View(Selection()));
      StateStream::Options options;
      options.module = "bench";
      options.skip_digests = true;
      const auto stream = OrDie(StateStream::Create(std::move(contents), std::move(options)));
      for (auto message = OrDie(stream->Next()); message && !stop;
           message = OrDie(stream->Next())) {
        bytes += message->Length();
      }
    }
  }

  // Saves the module, its optimizer state too, one save after the other.
  void Save(const std::atomic<bool>& stop, std::atomic<uint64_t>& bytes) {
    std::string root = absl::StrCat(absl::GetFlag(FLAGS_save_to), "/modelstate-bench-XXXXXX");
    if (mkdtemp(root.data()) == nullptr) OrDie(ErrnoError(errno, root));
    const auto store = OrDie(CheckpointStore::Open(root));
    SaveOptions options;
    options.overwrite = true;
    while (!stop) {
      absl::Notification captured;
      absl::StatusOr<CapturedState> state;
      module_->Capture(true, [&](absl::StatusOr<CapturedState> result) {
        state = std::move(result);
        captured.Notify();
      });
      captured.WaitForNotification();
      OrDie(state.status());
      const auto ignore = [](const JobProgress&) {};
      bytes += OrDie(store->Save(*state, "bench", options, JobControl(ignore))).nbytes;
    }
    std::filesystem::remove_all(root);
  }

 private:
  const std::unique_ptr<Device> device_;
  ComputePool compute_{0};
  asio::thread_pool strands_{2};
  const std::shared_ptr<MemoryBudget> snapshots_, pushes_;
  std::shared_ptr<ModuleInstance> module_;
};

double At(std::vector<double>& values, double part) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
}

void Run() {
  Bench bench;
  for (int i = 0; i < 20; ++i) bench.Step();
  const bool saves = !absl::GetFlag(FLAGS_save_to).empty();
  const int others = saves ? 1 : absl::GetFlag(FLAGS_readers);
  std::vector<double> alone, loaded;
  std::atomic<uint64_t> bytes{0};
  double reading = 0;
  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (int i = 0; i < absl::GetFlag(FLAGS_steps); ++i) alone.push_back(bench.Step());
    std::atomic<bool> stop{false};
    std::vector<std::thread> readers;
    const double begin = Now();
    for (int r = 0; r < others; ++r) {
      readers.emplace_back([&] { saves ? bench.Save(stop, bytes) : bench.Read(stop, bytes); });
    }
    for (int i = 0; i < 10; ++i) bench.Step();  // while they begin
    for (int i = 0; i < absl::GetFlag(FLAGS_steps); ++i) loaded.push_back(bench.Step());
    stop = true;
    for (std::thread& reader : readers) reader.join();
    reading += Now() - begin;
  }
  std::printf("AdamW over %llu MiB on %s, %zu steps of each kind\n%-34s %8s %8s %8s\n",
              static_cast<unsigned long long>(absl::GetFlag(FLAGS_bytes) >> 20),
              absl::GetFlag(FLAGS_device).c_str(), alone.size(), "", "p50 ms", "p99 ms", "max ms");
  const auto print = [](const char* name, std::vector<double>& values) {
    std::printf("%-34s %8.2f %8.2f %8.2f\n", name, 1e3 * At(values, 0.5), 1e3 * At(values, 0.99),
                1e3 * At(values, 1));
  };
  print("alone", alone);
  print(saves ? "beside saves" : "beside readers", loaded);
  std::printf("%-34s %8.2f %8.2f\n%d %s took %.1f GB/s together\n", "ratio",
              At(loaded, 0.5) / At(alone, 0.5), At(loaded, 0.99) / At(alone, 0.99), others,
              saves ? "saver" : "readers", static_cast<double>(bytes) / reading / 1e9);
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  modelstate::Run();
  return 0;
}
