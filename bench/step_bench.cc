// Steps of AdamW through a real server process.
//
//   build/release/bin/step_bench [--sections=push,memory,latency] [--mb=400] [--rounds=11]
//       [--server=PATH]
//
// push     From the first byte of a push to the answer that it is published, against raw TCP into
//          the memory of another process that then runs the plain loop. Interleaved.
// memory   The server's peak of resident memory over pushes, against the bytes of parameters,
//          optimizer state and one push; then while readers stream.
// latency  Of small pushes, with and without readers that stream all the time, in turns.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/plain_optimizers.h"
#include "bench/process_stats.h"
#include "bench/raw_tcp.h"
#include "bench/server_process.h"
#include "client/client.h"

ABSL_FLAG(std::vector<std::string>, sections,
          (std::vector<std::string>{"push", "memory", "latency"}), "what to measure");
ABSL_FLAG(int, mb, 400, "megabytes of gradients of one push");
ABSL_FLAG(int, rounds, 11, "rounds of push, each measuring every row once");
ABSL_FLAG(int, latency_mb, 16, "the same of a push whose latency is taken");
ABSL_FLAG(int, latency_pushes, 100, "in a turn, of which there are `rounds` of each kind");
ABSL_FLAG(int, latency_readers, 32, "that stream in every other turn");
ABSL_FLAG(std::string, read_from, "", "for its own use: be one of the readers of this server");
ABSL_FLAG(std::string, read_module, "", "and read this");
ABSL_FLAG(std::string, device, "cpu", "where the modules are");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");

namespace modelstate {
namespace {

// A module of equal tensors under AdamW, and a push to it.
class Pushed {
 public:
  Pushed(const Client& client, std::string name, size_t tensors, size_t bytes)
      : client_(client), name_(std::move(name)), gradients_(bytes / sizeof(float), 1e-3F) {
    const size_t elements = gradients_.size() / tensors;
    std::vector<TensorSpec> specs(tensors);
    for (size_t i = 0; i < tensors; ++i) {
      specs[i].name = absl::StrCat("layer", i, ".weight");
      specs[i].shape = OrDie(Shape::Create({static_cast<int64_t>(elements)}));
      client::TensorRef& tensor = push_.emplace_back();
      tensor.spec = specs[i];
      tensor.spec.kind = TensorKind::kGradient;
      tensor.bytes = {reinterpret_cast<const uint8_t*>(gradients_.data() + i * elements),
                      elements * sizeof(float)};
    }
    OrDie(client.CreateModule(name_, specs));
    client::OptimizerConfig config;
    config.algorithm = client::Algorithm::kAdamW;
    config.max_grad_norm = 1;
    OrDie(client.ConfigureOptimizer(name_, config));
  }

  // Seconds until the answer.
  double Push() {
    client::StepOptions options;
    options.digests = false;
    return Seconds([&] { OrDie(client_.ApplyStep(name_, push_, options)); });
  }
  const float* gradients() const { return gradients_.data(); }
  size_t bytes() const { return gradients_.size() * sizeof(float); }

 private:
  const Client& client_;
  const std::string name_;
  std::vector<float> gradients_;
  std::vector<client::TensorRef> push_;
};

// The plain loop on the other side of RawTcp; made there, with its threads.
class PlainServer {
 public:
  explicit PlainServer(size_t bytes) : elements_(bytes / sizeof(float)) {}
  void operator()(const uint8_t* gradients) {
    if (model_ == nullptr) {
      model_ = std::make_shared<PlainModel>(elements_);
      compute_ = std::make_shared<ComputePool>(0);
    }
    model_->Step(PlainAdamW, reinterpret_cast<const float*>(gradients), *compute_);
  }

 private:
  size_t elements_;
  std::shared_ptr<PlainModel> model_;
  std::shared_ptr<ComputePool> compute_;
};

// Processes that fetch a module over and over, until the object ends. They have the lowest
// priority: what a reader does with its bytes is not the server's cost.
class Readers {
 public:
  Readers(const std::string& target, const std::string& module, int count) {
    const std::string target_flag = absl::StrCat("--read_from=", target);
    const std::string module_flag = absl::StrCat("--read_module=", module);
    for (int i = 0; i < count; ++i) {
      const pid_t pid = fork();
      if (pid == 0) {  // nothing here may allocate: there were threads
        if (nice(19) == 19) {
          execl("/proc/self/exe", "step_bench", target_flag.c_str(), module_flag.c_str(), nullptr);
        }
        std::_Exit(1);
      }
      pids_.push_back(pid);
    }
  }
  ~Readers() {
    for (pid_t pid : pids_) kill(pid, SIGKILL);
    for (pid_t pid : pids_) waitpid(pid, nullptr, 0);
  }

 private:
  std::vector<pid_t> pids_;
};

[[noreturn]] void Read(const std::string& target, const std::string& module) {
  const Client client = ConnectNear(target);
  client::FetchOptions options;
  options.digests = false;
  for (;;) OrDie(client.Fetch(module, options));
}

void PushSection(const std::string& binary) {
  const size_t bytes = static_cast<size_t>(absl::GetFlag(FLAGS_mb)) * 1000000;
  RawTcp tcp(bytes, PlainServer(bytes));  // forks: before gRPC starts threads
  RawTcp only_tcp(bytes);
  const ServerProcess server(binary, absl::GetFlag(FLAGS_device));
  const Client client = ConnectNear(server.target());
  Pushed one(client, "one", 1, bytes);
  Pushed many(client, "many", 300, bytes);
  const auto* source = reinterpret_cast<const uint8_t*>(one.gradients());
  struct Row {
    const char* name;
    std::function<double()> run;
    std::vector<double> seconds = {};
  };
  std::vector<Row> rows = {{"raw TCP, then the plain loop", [&] { return tcp.Push(source); }},
                           {"push of 1 tensor", [&] { return one.Push(); }},
                           {"push of 300 tensors", [&] { return many.Push(); }},
                           {"raw TCP alone", [&] { return only_tcp.Push(source); }}};
  for (int round = -2; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (Row& row : rows) {
      const double seconds = row.run();
      if (round >= 0) row.seconds.push_back(seconds);  // those before warm up pools and pages
    }
  }
  std::printf("\npush of %zu MB and AdamW, %d rounds\n%-34s %8s %8s %8s %8s\n", bytes / 1000000,
              absl::GetFlag(FLAGS_rounds), "", "ms", "best ms", "ratio", "of best");
  const auto best = [](const Row& row) {
    return *std::min_element(row.seconds.begin(), row.seconds.end());
  };
  for (const Row& row : rows) {
    std::vector<double> ratios;
    for (size_t i = 0; i < row.seconds.size(); ++i) {
      ratios.push_back(rows[0].seconds[i] / row.seconds[i]);
    }
    std::printf("%-34s %8.1f %8.1f %8.2f %8.2f\n", row.name, 1e3 * Median(row.seconds),
                1e3 * best(row), Median(ratios), best(rows[0]) / best(row));
  }
}

void MemorySection(const std::string& binary) {
  constexpr int kPushes = 30;
  constexpr int kReaders = 8;
  const size_t bytes = static_cast<size_t>(absl::GetFlag(FLAGS_mb)) * 1000000;
  const double own = 4 * static_cast<double>(bytes) / 1e6;
  std::printf("\npeak resident memory of the server over %d pushes of %zu MB, in MB\n", kPushes,
              bytes / 1000000);
  std::printf("%-34s %8s %8s %8s\n", "", "peak", "of it", "beyond");
  const auto print = [own](const char* name, double peak) {
    std::printf("%-34s %8.0f %8.0f %8.0f\n", name, peak, own, peak - own);
  };
  for (int readers : {0, kReaders}) {
    const ServerProcess server(binary, absl::GetFlag(FLAGS_device));
    const Client client = ConnectNear(server.target());
    Pushed module(client, "bench", 300, bytes);
    const Readers reading(server.target(), "bench", readers);
    for (int i = 0; i < kPushes; ++i) module.Push();
    print(readers == 0 ? "no readers" : "8 readers stream all the time",
          static_cast<double>(PeakResidentBytes(server.pid())) / 1e6);
  }
}

void LatencySection(const std::string& binary) {
  const size_t bytes = static_cast<size_t>(absl::GetFlag(FLAGS_latency_mb)) * 1000000;
  const int count = absl::GetFlag(FLAGS_latency_readers);
  const ServerProcess server(binary, absl::GetFlag(FLAGS_device));
  const Client client = ConnectNear(server.target());
  Pushed module(client, "bench", 100, bytes);
  for (int i = 0; i < 20; ++i) module.Push();
  std::vector<double> alone, loaded;
  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (int i = 0; i < absl::GetFlag(FLAGS_latency_pushes); ++i) alone.push_back(module.Push());
    const Readers reading(server.target(), "bench", count);
    for (int i = 0; i < 20; ++i) module.Push();  // while they connect
    for (int i = 0; i < absl::GetFlag(FLAGS_latency_pushes); ++i) loaded.push_back(module.Push());
  }
  std::printf("\nlatency of a push of %zu MB, %zu of each kind\n%-34s %8s %8s %8s\n",
              bytes / 1000000, alone.size(), "", "p50 ms", "p99 ms", "max ms");
  const auto at = [](std::vector<double>& values, double part) {
    std::sort(values.begin(), values.end());
    return values[static_cast<size_t>(part * static_cast<double>(values.size() - 1))];
  };
  const auto print = [&at](const std::string& name, std::vector<double>& values) {
    std::printf("%-34s %8.1f %8.1f %8.1f\n", name.c_str(), 1e3 * at(values, 0.5),
                1e3 * at(values, 0.99), 1e3 * at(values, 1));
  };
  print("no readers", alone);
  print(absl::StrCat(count, " readers stream all the time"), loaded);
  std::printf("%-34s %8.2f %8.2f\n", "ratio", at(loaded, 0.5) / at(alone, 0.5),
              at(loaded, 0.99) / at(alone, 0.99));
}

void Run(const std::string& binary) {
  for (const std::string& section : absl::GetFlag(FLAGS_sections)) {
    if (section == "push") {
      PushSection(binary);
    } else if (section == "memory") {
      MemorySection(binary);
    } else if (section == "latency") {
      LatencySection(binary);
    } else {
      std::fprintf(stderr, "--sections: there is no %s\n", section.c_str());
      std::exit(1);
    }
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  if (const std::string target = absl::GetFlag(FLAGS_read_from); !target.empty()) {
    modelstate::Read(target, absl::GetFlag(FLAGS_read_module));
  }
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
