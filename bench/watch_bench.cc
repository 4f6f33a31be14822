// What watchers cost a training step: the time of a step of one module, in turns without and with
// so many WatchModule calls on it, and their ratio. The watchers are real channels to
// the server's port, in another process, which runs at low priority: what they do with a message is
// not the server's cost.
#include <grpcpp/grpcpp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "modelstate/v1/service.grpc.pb.h"
#include "server/optim/gradient_set.h"
#include "server/rpc/server.h"

ABSL_FLAG(int, watchers, 500, "WatchModule calls in the rounds that have them");
ABSL_FLAG(int, channels, 50, "connections that they share");
ABSL_FLAG(int, rounds, 5, "rounds of each kind");
ABSL_FLAG(int, steps, 2000, "steps of a round");
ABSL_FLAG(int, tensors, 4, "parameters of the module");
ABSL_FLAG(int64_t, elements, int64_t{1} << 20, "F32 elements of each");

namespace {

using namespace modelstate;  // NOLINT: a program

void Check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "watch_bench: %s\n", what.c_str());
  std::exit(1);
}

// Counts of all watchers of the child.
struct Counts {
  std::mutex mutex;
  std::condition_variable changed;
  int started = 0;
  int ended = 0;
  uint64_t messages = 0;
};

class Watcher final : public grpc::ClientReadReactor<v1::WatchModuleResponse> {
 public:
  Watcher(v1::ModelState::Stub& stub, Counts* counts) : counts_(*counts) {
    v1::WatchModuleRequest request;
    request.set_module("bench");
    request_ = request;
    stub.async()->WatchModule(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }
  void Cancel() { context_.TryCancel(); }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;
    {
      std::lock_guard<std::mutex> lock(counts_.mutex);
      ++counts_.messages;
      if (!std::exchange(seen_, true)) ++counts_.started;
      counts_.changed.notify_one();
    }
    StartRead(&response_);
  }
  void OnDone(const grpc::Status&) override {
    std::lock_guard<std::mutex> lock(counts_.mutex);
    ++counts_.ended;
    counts_.changed.notify_one();
  }

  Counts& counts_;
  grpc::ClientContext context_;
  v1::WatchModuleRequest request_;
  v1::WatchModuleResponse response_;
  bool seen_ = false;
};

// Reads the port, then for each '+' opens the watches and for each '-' ends them; answers with the
// number of messages that they have seen.
void RunWatchers(int commands, int answers) {
  Check(nice(19) != -1, "nice");
  int port = 0;
  if (read(commands, &port, sizeof(port)) != sizeof(port)) return;
  std::vector<std::unique_ptr<v1::ModelState::Stub>> stubs;
  for (int i = 0; i < absl::GetFlag(FLAGS_channels); ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    stubs.push_back(v1::ModelState::NewStub(grpc::CreateCustomChannel(
        absl::StrCat("localhost:", port), grpc::InsecureChannelCredentials(), arguments)));
  }
  const int count = absl::GetFlag(FLAGS_watchers);
  std::vector<std::unique_ptr<Watcher>> watchers;
  std::unique_ptr<Counts> counts;
  char command = 0;
  while (read(commands, &command, 1) == 1) {
    uint64_t messages = 0;
    if (command == '+') {
      counts = std::make_unique<Counts>();
      for (int i = 0; i < count; ++i) {
        watchers.push_back(
            std::make_unique<Watcher>(*stubs[static_cast<size_t>(i) % stubs.size()], counts.get()));
      }
      std::unique_lock<std::mutex> lock(counts->mutex);
      counts->changed.wait(lock, [&] { return counts->started == count; });
    } else {
      for (auto& watcher : watchers) watcher->Cancel();
      std::unique_lock<std::mutex> lock(counts->mutex);
      counts->changed.wait(lock, [&] { return counts->ended == count; });
      messages = counts->messages;
      lock.unlock();
      watchers.clear();
    }
    Check(write(answers, &messages, sizeof(messages)) == sizeof(messages), "write");
  }
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Step(ModuleInstance& module) {
  const VersionRef current = module.Current();
  std::vector<PushedTensor> table;
  for (const TensorSpec& spec : current->schema->specs()) {
    table.push_back({spec.name, TensorKind::kGradient, spec.dtype, spec.shape});
  }
  auto gradients = StageGradients(current->schema, std::move(table), *current->device,
                                  *module.environment().push_budget);
  Check(gradients.ok(), std::string(gradients.status().message()));
  StepRequest request;
  request.gradients = *std::move(gradients);
  absl::Notification done;
  module.ApplyStep(std::move(request), [&](absl::StatusOr<StepAnswer> answer) {
    Check(answer.ok(), std::string(answer.status().message()));
    done.Notify();
  });
  done.WaitForNotification();
}

void Run(int commands, int answers) {
  ServerOptions options;
  options.listen = "localhost:0";
  options.device = "cpu";
  char root[] = "/tmp/watch_bench.XXXXXX";
  Check(mkdtemp(root) != nullptr, "mkdtemp");
  options.checkpoint_root = root;
  auto server = Server::Start(options);
  Check(server.ok(), std::string(server.status().message()));
  auto stub = v1::ModelState::NewStub((*server)->InProcessChannel(grpc::ChannelArguments()));
  v1::CreateModuleRequest create;
  create.set_name("bench");
  for (int i = 0; i < absl::GetFlag(FLAGS_tensors); ++i) {
    v1::TensorInfo* tensor = create.mutable_spec()->add_tensors();
    tensor->set_name(absl::StrCat("layer", i, ".weight"));
    tensor->set_kind(v1::PARAMETER);
    tensor->set_dtype(v1::F32);
    tensor->add_shape(absl::GetFlag(FLAGS_elements));
  }
  v1::Module created;
  grpc::ClientContext create_context;
  Check(stub->CreateModule(&create_context, create, &created).ok(), "CreateModule");
  v1::ConfigureOptimizerRequest configure;
  configure.set_module("bench");
  configure.mutable_optimizer()->set_algorithm(v1::SGD);
  configure.mutable_optimizer()->mutable_hyperparameters()->set_lr(1e-6);
  v1::Optimizer optimizer;
  grpc::ClientContext configure_context;
  Check(stub->ConfigureOptimizer(&configure_context, configure, &optimizer).ok(), "optimizer");
  const auto module = *(*server)->runtime().registry->Find("bench");
  const int port = (*server)->port();
  Check(write(commands, &port, sizeof(port)) == sizeof(port), "write");
  const auto command = [&](char what) {
    uint64_t messages = 0;
    Check(write(commands, &what, 1) == 1 &&
              read(answers, &messages, sizeof(messages)) == sizeof(messages),
          "the watchers ended");
    return messages;
  };

  for (int i = 0; i < 20; ++i) Step(*module);
  std::vector<double> means[2];
  uint64_t messages = 0;
  double watched_seconds = 0;
  for (int round = 0; round < 2 * absl::GetFlag(FLAGS_rounds); ++round) {
    const int watched = round % 2;
    if (watched != 0) command('+');
    for (int i = 0; i < 300; ++i) Step(*module);  // past the burst of a beginning
    const double begin = Seconds();
    for (int i = 0; i < absl::GetFlag(FLAGS_steps); ++i) Step(*module);
    const double seconds = Seconds() - begin;
    means[watched].push_back(seconds / absl::GetFlag(FLAGS_steps));
    if (watched != 0) {
      messages += command('-');
      watched_seconds += seconds;
    }
  }
  const double without = Median(means[0]);
  const double with = Median(means[1]);
  std::printf("step without watchers   %8.3f ms (median of %zu rounds of %d steps)\n",
              1e3 * without, means[0].size(), absl::GetFlag(FLAGS_steps));
  std::printf("step with %4d watchers %8.3f ms, %.1f messages/s to each\n",
              absl::GetFlag(FLAGS_watchers), 1e3 * with,
              static_cast<double>(messages) / absl::GetFlag(FLAGS_watchers) / watched_seconds);
  // Of each round with the one before it, which had the same machine beside it.
  std::vector<double> ratios;
  for (size_t i = 0; i < means[0].size(); ++i) ratios.push_back(means[1][i] / means[0][i]);
  std::printf("ratio of the medians    %8.3f\n", with / without);
  std::printf("median of the ratios    %8.3f\n", Median(ratios));
  server->reset();
  std::filesystem::remove_all(root);
}

}  // namespace

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  int commands[2];
  int answers[2];
  Check(pipe(commands) == 0 && pipe(answers) == 0, "pipe");
  const pid_t child = fork();  // before gRPC has threads
  Check(child >= 0, "fork");
  if (child == 0) {
    close(commands[1]);
    RunWatchers(commands[0], answers[1]);
    return 0;
  }
  close(commands[0]);
  Run(commands[1], answers[0]);
  close(commands[1]);
  waitpid(child, nullptr, 0);
  return 0;
}
