// What a step costs from a complete push to the version that it publishes, against the loop that a
// person would write to step in place, on the same threads and interleaved in the same run.
//
//   build/release/bin/optimizer_bench [--sections=adamw,sets,adam,sgd,tensors,bf16,round]
//       [--elements=100000000] [--rounds=15] [--threads=0]
//
// Rates are bytes per second that must move: of AdamW 28 an element (read p, g, m, v; write p, m,
// v), of SGD with momentum 20, and of a step 4 more, as it reads the gradients first: nothing may
// be written before all of them are known to be finite. `ratio` compares rates with the section's
// first row: the median over the rounds of the ratio within a round, and the ratio of the best of
// each.

#include <algorithm>
#include <asio/thread_pool.hpp>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "bench/plain_optimizers.h"
#include "bench/support.h"
#include "common/base/tensor_cast.h"
#include "server/device/cpu/cpu_device.h"
#include "server/module/module_instance.h"
#include "server/optim/norm_stream.h"
#include "server/optim/step.h"

ABSL_FLAG(std::vector<std::string>, sections,
          (std::vector<std::string>{"adamw", "sets", "adam", "sgd", "tensors", "bf16", "round"}),
          "what to measure");
ABSL_FLAG(int64_t, elements, 100000000, "parameters of each module");
ABSL_FLAG(int, rounds, 15, "rounds, each measuring every row once");
ABSL_FLAG(int, threads, 0, "threads of the step and of the loop; 0: one per core");

namespace modelstate {
namespace {

struct Machine {
  CpuDevice device{uint64_t{1} << 40};
  ComputePool compute{static_cast<size_t>(absl::GetFlag(FLAGS_threads))};
  asio::thread_pool strands{1};
  std::shared_ptr<MemoryBudget> budget =
      std::make_shared<MemoryBudget>(Reason::kPushMemory, "memory for pushes", "", ~0ull);

  ModuleEnvironment Environment() {
    ModuleEnvironment environment;
    environment.device = &device;
    environment.compute = &compute;
    environment.strands = &strands;
    environment.snapshot_budget = budget;
    environment.push_budget = budget;
    return environment;
  }
};

size_t Elements() { return static_cast<size_t>(absl::GetFlag(FLAGS_elements)); }

// Gradients of many magnitudes with a norm that is to be clipped. Runs on all threads, as whoever
// receives a push has touched it all shortly before the step.
void FillGradients(Machine& machine, DType dtype, absl::Span<uint8_t> bytes) {
  constexpr size_t kBlock = size_t{1} << 16;
  std::vector<float> values(kBlock);
  for (size_t i = 0; i < kBlock; ++i) values[i] = 1e-3F * static_cast<float>(i % 1000) - 0.3F;
  std::vector<uint8_t> block(kBlock * DTypeSize(dtype));
  CastElements(DType::kF32, reinterpret_cast<const uint8_t*>(values.data()), dtype, block.data(),
               kBlock);
  machine.compute.ParallelFor((bytes.size() + block.size() - 1) / block.size(), [&](size_t i) {
    const size_t begin = i * block.size();
    std::memcpy(bytes.data() + begin, block.data(), std::min(block.size(), bytes.size() - begin));
  });
}

// The plain loops, over gradients in the same kind of memory as a server's.
class Plain {
 public:
  explicit Plain(Machine& machine)
      : machine_(machine),
        gradients_(OrDie(machine.device.pool()->Allocate(Elements() * sizeof(float)))) {}

  // Seconds of one step.
  double Run(PlainLoop loop) {
    FillGradients(machine_, DType::kF32, {gradients_.data(), gradients_.size()});
    const double begin = Now();
    model_.Step(loop, reinterpret_cast<const float*>(gradients_.data()), machine_.compute);
    return Now() - begin;
  }

 private:
  Machine& machine_;
  PlainModel model_{Elements()};
  DeviceBuffer gradients_;
};

struct StepSpec {
  Algorithm algorithm = Algorithm::kAdamW;
  size_t tensors = 1;
  DType dtype = DType::kF32;
  uint32_t contributions = 1;
  // The gradients' norms are known when the step begins, as of a push in chunks, whose receiver
  // computes them. Not so in rounds and of what was accumulated.
  bool norms = true;
};

// The parameters of a spec, and the pushes that a server would have received for them.
class Pushes {
 public:
  Pushes(Machine& machine, const StepSpec& spec) : machine_(machine), spec_(spec) {
    std::vector<TensorSpec> specs(spec.tensors);
    for (size_t i = 0; i < specs.size(); ++i) {
      specs[i].name = absl::StrCat("p", i);
      specs[i].dtype = spec.dtype;
      specs[i].shape = OrDie(Shape::Create({static_cast<int64_t>(Elements() / spec.tensors)}));
      table_.push_back({specs[i].name, TensorKind::kGradient, spec.dtype, specs[i].shape});
    }
    schema_ = OrDie(ModuleSchema::Create(std::move(specs), 1));
  }

  const std::shared_ptr<const ModuleSchema>& schema() const { return schema_; }

  std::vector<StorageRef> Zeros() {
    std::vector<StorageRef> storages;
    for (const TensorSpec& tensor : schema_->specs()) {
      RefPtr<TensorStorage> storage =
          OrDie(TensorStorage::Allocate(machine_.device, tensor.nbytes()));
      if (!machine_.device.FillZero(storage->MutableBuffer()).ok()) std::exit(1);
      storages.push_back(std::move(storage));
    }
    return storages;
  }

  GradientSet Receive(MemoryBudget& budget) {
    GradientSet gradients = OrDie(StageGradients(schema_, table_, machine_.device, budget));
    NormStream norm;
    for (GradientSet::Entry& entry : gradients.entries) {
      const absl::Span<uint8_t> bytes = entry.storage->MutableHostBytes();
      if (spec_.tensors == 1) {
        FillGradients(machine_, spec_.dtype, bytes);
      } else {
        std::fill_n(reinterpret_cast<float*>(bytes.data()), bytes.size() / sizeof(float), 0.1F);
      }
      if (!spec_.norms) continue;
      norm.Begin(spec_.dtype, spec_.dtype, 1);
      norm.Update(bytes);
      entry.norm = norm.Finish();
    }
    return gradients;
  }

 private:
  Machine& machine_;
  const StepSpec spec_;
  std::vector<PushedTensor> table_;
  std::shared_ptr<const ModuleSchema> schema_;
};

OptimizerConfig MakeConfig(const StepSpec& spec, bool clip) {
  OptimizerConfig config;
  config.algorithm = spec.algorithm;
  config.rounds.quorum = spec.contributions;
  if (spec.algorithm == Algorithm::kSgd) config.hyperparameters.momentum = 0.9;
  if (clip) config.max_grad_norm = 1;
  return config;
}

// A module as a server hosts it.
class HostedModule {
 public:
  HostedModule(Machine& machine, const StepSpec& spec)
      : spec_(spec),
        pushes_(machine, spec),
        module_(std::make_shared<ModuleInstance>("bench", machine.Environment(), pushes_.schema(),
                                                 pushes_.Zeros(), ModuleMetadata())) {}

  // Seconds from the last push of a step to the answer that its version is published.
  double Run(bool clip) {
    if (clip != clip_) {
      clip_ = clip;
      Await<ModuleInstance::ConfigureResult>(
          [&](auto done) { module_->ConfigureOptimizer(MakeConfig(spec_, clip), false, done); });
    }
    ++sequence_;
    double begin = 0;
    StepAnswer answer;
    for (uint32_t i = 0; i < spec_.contributions; ++i) {
      StepRequest request;
      request.worker = absl::StrCat("worker", i);
      request.sequence = sequence_;
      request.gradients = pushes_.Receive(*module_->push_budget());
      begin = Now();
      answer = Await<StepAnswer>(
          [&](auto done) { module_->ApplyStep(std::move(request), std::move(done)); });
    }
    const double seconds = Now() - begin;
    if (answer.outcome != StepOutcome::kApplied || (clip && answer.clip_coef == 1)) std::exit(1);
    return seconds;
  }

 private:
  template <typename T, typename Call>
  static T Await(Call call) {
    absl::Notification done;
    absl::StatusOr<T> result;
    call([&](absl::StatusOr<T> answer) {
      result = std::move(answer);
      done.Notify();
    });
    done.WaitForNotification();
    return OrDie(std::move(result));
  }

  const StepSpec spec_;
  Pushes pushes_;
  const std::shared_ptr<ModuleInstance> module_;
  std::optional<bool> clip_;
  uint64_t sequence_ = 0;
};

// Only the step, by each instruction set; a server takes the best that there is.
class BareStep {
 public:
  explicit BareStep(Machine& machine) : machine_(machine), pushes_(machine, {}) {
    version_.device = &machine.device;
    version_.schema = pushes_.schema();
    version_.storages = pushes_.Zeros();
    state_.parameters.resize(version_.schema->size());
  }

  double Run(InstructionSet set) {
    const auto optimizer = OrDie(Optimizer::Create(MakeConfig({}, true), *version_.schema));
    StepOptions options;
    options.hyperparameters = OrDie(optimizer->Resolve({}));
    options.instruction_set = set;
    std::vector<Contribution> contributions(1);
    contributions.front().parts.push_back({pushes_.Receive(*machine_.budget)});
    const double begin = Now();
    StepResult result = OrDie(
        ApplyOptimizerStep(version_, *optimizer, options, contributions, state_, machine_.compute));
    version_.storages = std::move(result.storages);
    const double seconds = Now() - begin;
    if (!result.applied || result.clip_coef == 1) std::exit(1);
    return seconds;
  }

 private:
  Machine& machine_;
  Pushes pushes_;
  ModuleVersion version_;
  OptimizerState state_;
};

struct Row {
  std::string name;
  double bytes;  // an element
  std::function<double()> run;
  std::vector<double> seconds = {};
};

void Measure(const std::string& title, std::vector<Row> rows) {
  for (int round = -1; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (Row& row : rows) {
      const double seconds = row.run();
      if (round >= 0) row.seconds.push_back(seconds);  // the one before warms up pools and pages
    }
  }
  std::printf("\n%-34s %6s %8s %8s %8s %8s %8s\n", title.c_str(), "bytes", "ms", "best ms", "GB/s",
              "ratio", "of best");
  const Row& base = rows.front();
  const auto best = [](const Row& row) {
    return *std::min_element(row.seconds.begin(), row.seconds.end());
  };
  for (const Row& row : rows) {
    const double scale = row.bytes / base.bytes;
    std::vector<double> ratios;
    for (size_t i = 0; i < row.seconds.size(); ++i) {
      ratios.push_back(scale * base.seconds[i] / row.seconds[i]);
    }
    const double median = Median(row.seconds);
    std::printf("%-34s %6.0f %8.1f %8.1f %8.1f %8.2f %8.2f\n", row.name.c_str(), row.bytes,
                1e3 * median, 1e3 * best(row),
                row.bytes * static_cast<double>(Elements()) / median / 1e9, Median(ratios),
                scale * best(base) / best(row));
  }
  std::fflush(stdout);
}

void AdamWSection(Machine& machine) {
  Plain plain(machine);
  HostedModule module(machine, {});
  HostedModule no_norms(machine, {.norms = false});
  Measure("AdamW", {{"plain loop", 28, [&] { return plain.Run(PlainAdamW); }},
                    {"step", 28, [&] { return module.Run(false); }},
                    {"step, clipped", 28, [&] { return module.Run(true); }},
                    {"step, norms not known", 32, [&] { return no_norms.Run(true); }},
                    {"triad", 12, [&] { return plain.Run(PlainTriad); }}});
}

void SetsSection(Machine& machine) {
  Plain plain(machine);
  BareStep step(machine);
  std::vector<Row> rows = {{"plain loop", 28, [&] { return plain.Run(PlainAdamW); }}};
  for (InstructionSet set : SupportedInstructionSets()) {
    rows.push_back({absl::StrCat("step, clipped, ", InstructionSetName(set)), 28,
                    [&step, set] { return step.Run(set); }});
  }
  Measure("AdamW by instruction set", std::move(rows));
}

void OneRule(Machine& machine, const std::string& title, Algorithm algorithm, PlainLoop loop,
             double bytes) {
  Plain plain(machine);
  HostedModule module(machine, {.algorithm = algorithm});
  Measure(title, {{"plain loop", bytes, [&] { return plain.Run(loop); }},
                  {"step", bytes, [&] { return module.Run(false); }},
                  {"step, clipped", bytes, [&] { return module.Run(true); }}});
}

void TensorsSection(Machine& machine) {
  HostedModule one(machine, {});
  HostedModule many(machine, {.tensors = Elements() / 1000});
  Measure("AdamW, many tensors",
          {{"1 tensor", 28, [&] { return one.Run(true); }},
           {"tensors of 1,000 elements", 28, [&] { return many.Run(true); }}});
}

void BFloat16Section(Machine& machine) {
  Plain plain(machine);
  HostedModule module(machine, {.dtype = DType::kBF16});
  // Read g (2), master, m, v; write p (2), master, m, v.
  Measure("AdamW, BF16 with F32 masters",
          {{"plain loop in F32", 28, [&] { return plain.Run(PlainAdamW); }},
           {"step, clipped", 28, [&] { return module.Run(true); }}});
}

void RoundSection(Machine& machine) {
  Plain plain(machine);
  HostedModule module(machine, {.contributions = 4, .norms = false});
  // Read four gradients twice, p, m, v; write p, m, v.
  Measure("AdamW, round of 4",
          {{"plain loop, one gradient", 28, [&] { return plain.Run(PlainAdamW); }},
           {"step, clipped", 56, [&] { return module.Run(true); }}});
}

void Run() {
  Machine machine;
  std::printf("%zu parameters, %zu threads, %d rounds\n", Elements(), machine.compute.threads(),
              absl::GetFlag(FLAGS_rounds));
  for (const std::string& section : absl::GetFlag(FLAGS_sections)) {
    if (section == "adamw") {
      AdamWSection(machine);
    } else if (section == "sets") {
      SetsSection(machine);
    } else if (section == "adam") {
      OneRule(machine, "Adam", Algorithm::kAdam, PlainAdam, 28);
    } else if (section == "sgd") {
      OneRule(machine, "SGD with momentum", Algorithm::kSgd, PlainSgdMomentum, 20);
    } else if (section == "tensors") {
      TensorsSection(machine);
    } else if (section == "bf16") {
      BFloat16Section(machine);
    } else if (section == "round") {
      RoundSection(machine);
    } else {
      std::fprintf(stderr, "--sections: there is no %s\n", section.c_str());
      std::exit(1);
    }
  }
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);  // as the server does
  modelstate::Run();
  return 0;
}
