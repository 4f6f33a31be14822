#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "common/base/tune_malloc.h"
#include "server/logging.h"
#include "server/rpc/server.h"
#include "server/server_flags.h"

namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;
constexpr int kExitDeviceFailed = 3;

// Blocked in every thread, so that sigwait gets them.
sigset_t BlockStopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

// As far as this process may: gRPC 1.51 never accepts again after a connection that found no free
// descriptor (https://github.com/grpc/grpc/issues/20418).
void RaiseFileLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

int Run(int argc, char** argv) {
  absl::StatusOr<modelstate::ServerFlags> flags =
      modelstate::ParseServerFlags(absl::MakeConstSpan(argv, static_cast<size_t>(argc)));
  if (!flags.ok()) {
    std::fprintf(stderr, "modelstate-server: %s\n", std::string(flags.status().message()).c_str());
    return kExitUsage;
  }
  if (flags->help) {
    std::fputs(modelstate::ServerFlagsHelp().c_str(), stdout);
    return 0;
  }
  modelstate::SetUpLogging(flags->log_level, flags->log_json);
  flags->options.log = [](absl::LogSeverity severity, const std::string& text) {
    const auto level = severity == absl::LogSeverity::kInfo      ? spdlog::level::info
                       : severity == absl::LogSeverity::kWarning ? spdlog::level::warn
                                                                 : spdlog::level::err;
    spdlog::log(level, "{}", text);
  };
  const sigset_t signals = BlockStopSignals();
  std::atomic<bool> device_failed = false;
  flags->options.on_device_failure = [&device_failed] {
    if (!device_failed.exchange(true)) kill(getpid(), SIGTERM);
  };
  absl::StatusOr<std::unique_ptr<modelstate::Server>> server =
      modelstate::Server::Start(flags->options);
  if (!server.ok()) {
    std::fprintf(stderr, "modelstate-server: %s\n", std::string(server.status().message()).c_str());
    return absl::IsInvalidArgument(server.status()) ? kExitUsage : kExitFailure;
  }
  // Scripts wait for this line.
  std::printf("listening on %s\n", (*server)->address().c_str());
  std::fflush(stdout);
  const modelstate::Runtime& runtime = (*server)->runtime();
  for (const std::unique_ptr<modelstate::Device>& device : runtime.devices) {
    spdlog::info("device {} with {} bytes", device->name(), device->pool()->usage().limit_bytes);
  }
  spdlog::info("checkpoints in {}", flags->options.checkpoint_root);

  int signal = 0;
  sigwait(&signals, &signal);
  spdlog::info("{}: draining for at most {}", device_failed ? "a device failed" : strsignal(signal),
               absl::FormatDuration(flags->options.drain_timeout));
  (*server)->Drain();
  spdlog::info("stopped");
  return device_failed ? kExitDeviceFailed : 0;
}

}  // namespace

int main(int argc, char** argv) {
  modelstate::TuneMalloc();
  RaiseFileLimit();
  // Debian's Abseil looks for lock cycles by default, which more than doubles the cost of a lock.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  return Run(argc, argv);
}
