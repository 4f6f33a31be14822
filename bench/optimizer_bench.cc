// AdamW over float32 against the memory bandwidth of the same machine in the same run.
//
// Rates are in bytes per second: of the step 32 per parameter (28 of AdamW: read p, g, m, v, write
// p, m, v; and the norm reads the gradients first); of the triad a[i] = b[i] + s * c[i] 12. The
// last lines print ratios to the triad with the same number of threads, the only numbers that mean
// something on a machine whose speed drifts.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/device/cpu/cpu_device.h"
#include "server/optim/step.h"

namespace modelstate {
namespace {

constexpr int64_t kElements = int64_t{1} << 25;
constexpr size_t kBlock = 65536;

void Triad(benchmark::State& state) {
  CpuDevice device(uint64_t{4} << 30);
  ComputePool compute(static_cast<size_t>(state.range(0)));
  std::vector<DeviceBuffer> buffers;
  for (int i = 0; i < 3; ++i) {
    buffers.push_back(*device.pool()->Allocate(kElements * sizeof(float)));
    if (!device.FillZero(buffers.back()).ok()) return state.SkipWithError("no memory");
  }
  float* __restrict__ a = reinterpret_cast<float*>(buffers[0].data());
  const float* __restrict__ b = reinterpret_cast<const float*>(buffers[1].data());
  const float* __restrict__ c = reinterpret_cast<const float*>(buffers[2].data());
  for (auto _ : state) {
    compute.ParallelFor(kElements / kBlock, [&](size_t block) {
      const size_t begin = block * kBlock;
      for (size_t i = begin; i < begin + kBlock; ++i) a[i] = b[i] + 3.0f * c[i];
    });
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kElements * 12);
}

// The whole of ApplyOptimizerStep: norm, finite check, update. Filling the next gradients, which
// the receiver of a push does, is not timed.
void AdamWStep(benchmark::State& state) {
  const int64_t tensors = state.range(1);
  CpuDevice device(uint64_t{4} << 30);
  ComputePool compute(static_cast<size_t>(state.range(0)));
  auto budget = std::make_shared<MemoryBudget>(Reason::kPushMemory, "memory for pushes", "", ~0ull);
  std::vector<TensorSpec> specs(static_cast<size_t>(tensors));
  std::vector<PushedTensor> table;
  for (size_t i = 0; i < specs.size(); ++i) {
    specs[i].name = absl::StrCat("p", i);
    specs[i].shape = *Shape::Create({kElements / tensors});
    table.push_back({specs[i].name, TensorKind::kGradient, DType::kF32, specs[i].shape});
  }
  ModuleVersion version;
  version.device = &device;
  version.schema = *ModuleSchema::Create(std::move(specs), 1);
  for (const TensorSpec& spec : version.schema->specs()) {
    RefPtr<TensorStorage> storage = *TensorStorage::Allocate(device, spec.nbytes());
    if (!device.FillZero(storage->MutableBuffer()).ok()) return state.SkipWithError("no memory");
    version.storages.push_back(std::move(storage));
  }
  OptimizerConfig config;
  config.algorithm = Algorithm::kAdamW;
  std::shared_ptr<const Optimizer> optimizer = *Optimizer::Create(config, *version.schema);
  OptimizerState optimizer_state;
  optimizer_state.parameters.resize(version.schema->size());
  StepOptions options;
  options.hyperparameters = *optimizer->Resolve({});

  auto step = [&](bool timed) {
    GradientSet gradients = *StageGradients(version.schema, table, device, *budget);
    for (GradientSet::Entry& entry : gradients.entries) {
      const absl::Span<uint8_t> bytes = entry.storage->MutableHostBytes();
      float* g = reinterpret_cast<float*>(bytes.data());
      for (size_t i = 0; i < bytes.size() / sizeof(float); ++i) g[i] = 1e-3f * (i % 1000);
    }
    std::vector<Contribution> contributions(1);
    contributions[0].parts.push_back({std::move(gradients)});
    if (timed) state.ResumeTiming();
    absl::StatusOr<StepResult> result =
        ApplyOptimizerStep(version, *optimizer, options, contributions, optimizer_state, compute);
    if (timed) state.PauseTiming();
    for (size_t i = 0; i < version.storages.size(); ++i) version.storages[i] = result->storages[i];
  };
  step(false);  // makes the moments, warms the pool
  for (auto _ : state) {
    state.PauseTiming();
    step(true);
    state.ResumeTiming();
  }
  state.SetBytesProcessed(state.iterations() * kElements * 32);
}

// Prints the usual table and keeps the best rate of each benchmark.
class RatioReporter : public benchmark::ConsoleReporter {
 public:
  void ReportRuns(const std::vector<Run>& runs) override {
    ConsoleReporter::ReportRuns(runs);
    for (const Run& run : runs) {
      auto rate = run.counters.find("bytes_per_second");
      if (run.run_type != Run::RT_Iteration || rate == run.counters.end()) continue;
      double& best = best_[run.benchmark_name()];
      best = std::max(best, rate->second.value);
    }
  }
  void PrintRatios() const {
    for (const auto& [name, rate] : best_) {
      const size_t slash = name.find('/');
      const std::string threads = name.substr(slash + 1, name.find('/', slash + 1) - slash - 1);
      for (const auto& [other, triad] : best_) {
        const std::string prefix = absl::StrCat("Triad/", threads, "/");
        if (other.compare(0, prefix.size(), prefix) != 0) continue;
        std::printf("%-40s %6.1f GB/s  %.2f x triad (%.1f GB/s)\n", name.c_str(), rate / 1e9,
                    rate / triad, triad / 1e9);
      }
    }
  }

 private:
  std::map<std::string, double> best_;
};

BENCHMARK(Triad)->Arg(1)->Arg(2)->UseRealTime()->Unit(benchmark::kMillisecond)->Repetitions(3);
BENCHMARK(AdamWStep)
    ->ArgNames({"", "tensors"})
    ->Args({1, 1})
    ->Args({2, 1})
    ->Args({2, 32768})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond)
    ->Repetitions(3);

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  modelstate::RatioReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  reporter.PrintRatios();
  return 0;
}
