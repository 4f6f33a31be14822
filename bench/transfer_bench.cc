// Fetch and push through a real server process against raw TCP in the same run, interleaved. Prints
// the median of each and its ratio to raw TCP; absolute numbers mean nothing beyond the run.
//
//   build/release/bin/transfer_bench [--mib=256] [--rounds=7] [--server=PATH]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/raw_tcp.h"
#include "bench/server_process.h"
#include "client/client.h"

ABSL_FLAG(int, mib, 256, "size of the module in MiB");
ABSL_FLAG(int, rounds, 7, "rounds, each measuring every row once");
ABSL_FLAG(std::string, only, "", "run this row alone and print nothing: for a profiler");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");

namespace modelstate {
namespace {

constexpr size_t kTensorBytes = size_t{8} << 20;

struct Row {
  const char* name;
  const char* baseline;  // name of the row that it is compared with
  std::function<void()> run;
  std::vector<double> seconds = {};
};

void Print(const std::vector<Row>& rows, size_t bytes) {
  std::printf("%-24s %8s %8s %8s %8s\n", "", "GB/s", "slowest", "fastest", "ratio");
  for (const Row& row : rows) {
    const auto baseline = std::find_if(rows.begin(), rows.end(), [&row](const Row& other) {
      return std::strcmp(other.name, row.baseline) == 0;
    });
    const double gigabytes = static_cast<double>(bytes) / 1e9;
    const auto [fastest, slowest] = std::minmax_element(row.seconds.begin(), row.seconds.end());
    std::printf("%-24s %8.2f %8.2f %8.2f %8.2f\n", row.name, gigabytes / Median(row.seconds),
                gigabytes / *slowest, gigabytes / *fastest,
                Median(baseline->seconds) / Median(row.seconds));
  }
}

void Run(const std::string& server_binary) {
  const size_t tensors =
      std::max<size_t>(1, static_cast<size_t>(absl::GetFlag(FLAGS_mib)) * (1 << 20) / kTensorBytes);
  const size_t bytes = tensors * kTensorBytes;
  RawTcp tcp(bytes);  // forks: before gRPC starts threads
  ServerProcess server(server_binary);
  client::Client client = ConnectNear(server.target());

  std::vector<TensorSpec> specs(tensors);
  for (size_t i = 0; i < tensors; ++i) {
    specs[i].name = absl::StrCat("layer", i, ".weight");
    specs[i].shape = OrDie(Shape::Create({static_cast<int64_t>(kTensorBytes / sizeof(float))}));
  }
  OrDie(client.CreateModule("bench", specs));
  client::OptimizerConfig optimizer;
  optimizer.algorithm = client::Algorithm::kSgd;
  OrDie(client.ConfigureOptimizer("bench", optimizer));

  std::vector<float> gradient(bytes / sizeof(float), 1e-3f);
  std::vector<uint8_t> destination(bytes, 1);
  const auto* source = reinterpret_cast<const uint8_t*>(gradient.data());
  std::vector<client::TensorRef> push(tensors);
  for (size_t i = 0; i < tensors; ++i) {
    push[i].spec = specs[i];
    push[i].spec.kind = TensorKind::kGradient;
    push[i].bytes = absl::MakeConstSpan(source + i * kTensorBytes, kTensorBytes);
  }

  client::FetchOptions no_digests;
  no_digests.digests = false;
  client::StepOptions step;
  step.digests = false;
  std::vector<Row> rows = {
      {"raw TCP fetch", "raw TCP fetch", [&] { tcp.Fetch(destination.data()); }},
      {"fetch, verified", "raw TCP fetch", [&] { OrDie(client.Fetch("bench")); }},
      {"fetch, no digests", "raw TCP fetch", [&] { OrDie(client.Fetch("bench", no_digests)); }},
      {"raw TCP push", "raw TCP push", [&] { tcp.Push(source); }},
      {"push and SGD step", "raw TCP push", [&] { OrDie(client.ApplyStep("bench", push, step)); }},
  };
  const std::string only = absl::GetFlag(FLAGS_only);
  for (int round = -1; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (Row& row : rows) {
      if (!only.empty() && row.name != only) continue;
      const double begin = Now();
      row.run();
      if (round >= 0) row.seconds.push_back(Now() - begin);  // the first warms up pools and pages
    }
  }
  if (!only.empty()) return;
  std::printf("%zu tensors, %zu MiB, %d rounds, medians\n", tensors, bytes >> 20,
              absl::GetFlag(FLAGS_rounds));
  Print(rows, bytes);
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
