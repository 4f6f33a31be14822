#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

constexpr uint64_t kTensorBytes = uint64_t{8} << 20;

struct BenchArguments {
  std::string server;
  uint64_t bytes = uint64_t{256} << 20;
  int rounds = 7;
  int calls = 500;
};

// A module with a free name, deleted again however the command ends but by kill -9.
class TemporaryModule {
 public:
  static absl::StatusOr<std::unique_ptr<TemporaryModule>> Create(
      const Client& client, absl::Span<const TensorSpec> tensors) {
    absl::BitGen random;
    const std::string name = absl::StrFormat("modelstate-bench-%016x", random());
    // Before the call: it may be created and the answer lost.
    auto module = absl::WrapUnique(new TemporaryModule(client, name));
    MS_RETURN_IF_ERROR(client.CreateModule(name, tensors).status());
    return module;
  }
  ~TemporaryModule() {
    if (deleted_) return;
    const absl::Status status = Delete();
    if (!status.ok() && !absl::IsNotFound(status)) {
      std::cerr << "modelstate: delete module " << name_
                << " yourself: " << Printable(status.message()) << "\n";
    }
  }
  TemporaryModule(const TemporaryModule&) = delete;
  TemporaryModule& operator=(const TemporaryModule&) = delete;

  absl::Status Delete() {
    deleted_ = true;
    return client_.DeleteModule(name_);
  }
  const std::string& name() const { return name_; }

 private:
  TemporaryModule(const Client& client, std::string name)
      : client_(client), name_(std::move(name)) {}

  const Client client_;
  const std::string name_;
  bool deleted_ = false;
};

// Of sorted values.
double Quantile(const std::vector<double>& sorted, double q) {
  return sorted[static_cast<size_t>(q * static_cast<double>(sorted.size() - 1) + 0.5)];
}

struct Measured {
  std::vector<double> fetch;  // seconds, sorted
  std::vector<double> push;
  std::vector<double> call;
};

template <typename Call>
absl::Status Time(const Call& call, std::vector<double>* seconds) {
  const absl::Time begin = absl::Now();
  MS_RETURN_IF_ERROR(call());
  seconds->push_back(absl::ToDoubleSeconds(absl::Now() - begin));
  return absl::OkStatus();
}

absl::StatusOr<Measured> Measure(const Context& context, const Client& client,
                                 const std::string& module, absl::Span<const TensorSpec> specs,
                                 const BenchArguments& arguments) {
  std::vector<float> elements(arguments.bytes / sizeof(float), 1e-3F);
  const auto* bytes = reinterpret_cast<const uint8_t*>(elements.data());
  std::vector<client::TensorRef> gradients;
  for (const TensorSpec& spec : specs) {
    client::TensorRef& gradient = gradients.emplace_back();
    gradient.spec = spec;
    gradient.spec.kind = TensorKind::kGradient;
    gradient.bytes = absl::MakeConstSpan(bytes, spec.nbytes());
    bytes += spec.nbytes();
  }
  client::OptimizerConfig optimizer;
  optimizer.algorithm = client::Algorithm::kSgd;
  MS_RETURN_IF_ERROR(client.ConfigureOptimizer(module, optimizer).status());
  Measured measured;
  for (int round = 0; round <= arguments.rounds; ++round) {
    MS_RETURN_IF_ERROR(
        Time([&] { return client.ApplyStep(module, gradients, {}, context.interrupt).status(); },
             &measured.push));
    MS_RETURN_IF_ERROR(Time([&] { return client.Fetch(module, {}, context.interrupt).status(); },
                            &measured.fetch));
    // The first warms up memory and the connection.
    if (round == 0) measured = {};
  }
  for (int i = 0; i < arguments.calls; ++i) {
    if (context.interrupt->cancelled()) return absl::CancelledError("interrupted");
    MS_RETURN_IF_ERROR(Time([&] { return client.GetModule(module).status(); }, &measured.call));
  }
  for (std::vector<double>* values : {&measured.fetch, &measured.push, &measured.call}) {
    std::sort(values->begin(), values->end());
  }
  return measured;
}

void Report(const Context& context, const Measured& measured, const BenchArguments& arguments) {
  const auto rate = [&](double seconds) {
    return static_cast<double>(arguments.bytes) / 1e6 / seconds;
  };
  if (context.json) {
    const auto transfer = [&](const std::vector<double>& seconds) {
      return Json{{"mb_per_second", rate(Quantile(seconds, 0.5))},
                  {"slowest_mb_per_second", rate(seconds.back())},
                  {"fastest_mb_per_second", rate(seconds.front())}};
    };
    Context::Print({{"server", context.server},
                    {"bytes", arguments.bytes},
                    {"rounds", arguments.rounds},
                    {"fetch", transfer(measured.fetch)},
                    {"push", transfer(measured.push)},
                    {"unary",
                     {{"calls", arguments.calls},
                      {"p50_us", Quantile(measured.call, 0.5) * 1e6},
                      {"p99_us", Quantile(measured.call, 0.99) * 1e6}}}});
    return;
  }
  Table table({"", "median", "slowest", "fastest"});
  for (const auto& [name, seconds] :
       {std::pair{"fetch, MB/s", &measured.fetch}, {"push and SGD step, MB/s", &measured.push}}) {
    table.Add({name, absl::StrFormat("%.0f", rate(Quantile(*seconds, 0.5))),
               absl::StrFormat("%.0f", rate(seconds->back())),
               absl::StrFormat("%.0f", rate(seconds->front()))});
  }
  table.Print();
  std::cout << absl::StrFormat("GetModule: p50 %.0f us, p99 %.0f us over %d calls\n",
                               Quantile(measured.call, 0.5) * 1e6,
                               Quantile(measured.call, 0.99) * 1e6, arguments.calls)
            << HumanBytes(arguments.bytes) << ", " << arguments.rounds
            << " rounds over one connection, digests checked both ways. Compared with nothing: "
               "what a plain TCP connection carries over this link, iperf3 says.\n";
}

absl::Status Bench(Context* context, const BenchArguments& arguments) {
  if (!arguments.server.empty()) context->server = arguments.server;
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  std::vector<TensorSpec> specs;
  for (uint64_t left = arguments.bytes; left > 0;) {
    const uint64_t bytes = std::min(left, kTensorBytes);
    TensorSpec& spec = specs.emplace_back();
    spec.name = absl::StrCat("tensor", specs.size());
    MS_ASSIGN_OR_RETURN(spec.shape, Shape::Create({static_cast<int64_t>(bytes / sizeof(float))}));
    left -= bytes;
  }
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<TemporaryModule> module,
                      TemporaryModule::Create(client, specs));
  MS_ASSIGN_OR_RETURN(const Measured measured,
                      Measure(*context, client, module->name(), specs, arguments));
  MS_RETURN_IF_ERROR(module->Delete());
  Report(*context, measured, arguments);
  return absl::OkStatus();
}

}  // namespace

void AddBenchCommand(CLI::App* app, Context* context) {
  auto arguments = std::make_shared<BenchArguments>();
  CLI::App* command = app->add_subcommand(
      "bench", "How fast the link to a server is: on a module of its own, deleted afterwards");
  command->group(kTransferGroup);
  command->add_option("SERVER", arguments->server, "In place of --server");
  command->add_option("--size", arguments->bytes, "Of the module: 64MB, 1GiB; its gradients too")
      ->transform(CLI::AsSizeValue(false))
      ->transform(WholeNumber<uint64_t>())  // looks first
      ->check(CLI::Range(uint64_t{4}, uint64_t{1} << 40));
  command->add_option("--rounds", arguments->rounds, "Pushes and fetches to measure")
      ->check(CLI::Range(1, 1000));
  command->add_option("--calls", arguments->calls, "Short calls to measure")
      ->check(CLI::Range(1, 1'000'000));
  command->callback([context, arguments] {
    arguments->bytes = arguments->bytes / sizeof(float) * sizeof(float);
    context->Finish(Bench(context, *arguments));
  });
}

}  // namespace modelstate::cli
