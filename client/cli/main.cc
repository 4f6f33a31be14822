// The `modelstate` command line: a thin layer over client/.
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <thread>

#include "client/cli/context.h"
#include "common/base/tune_malloc.h"

namespace {

constexpr char kFooter[] =
    "Exit codes:\n"
    "  0  done\n"
    "  1  a difference or a negative answer\n"
    "  2  wrong usage\n"
    "  3  not found\n"
    "  4  refused: an argument or the state does not allow it\n"
    "  5  the server cannot be reached, or took too long\n"
    "  6  data that arrived, or a file, is corrupt\n"
    "  130  interrupted\n";

// The first SIGINT, SIGTERM or SIGHUP cancels what runs. A second one ends the process, and so does
// a short while: connecting and short calls do not look for the first.
void CancelOnSignals(modelstate::client::Cancellation* cancellation) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  struct sigaction hangup = {};
  // Not where it is run with nohup.
  if (sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler != SIG_IGN) {
    sigaddset(&signals, SIGHUP);
  }
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::thread([signals, cancellation] {
    int signal = 0;
    sigwait(&signals, &signal);
    cancellation->Cancel();
    const timespec grace = {2, 0};
    sigtimedwait(&signals, nullptr, &grace);
    _exit(modelstate::cli::kInterrupted);
  }).detach();
}

}  // namespace

int main(int argc, char** argv) {
  using modelstate::cli::Context;
  modelstate::TuneMalloc();
  // Never destroyed: the signal thread uses it to the end.
  auto* cancellation = new modelstate::client::Cancellation();
  CancelOnSignals(cancellation);

  Context context;
  context.interrupt = cancellation;
  CLI::App app("Looks at, fills, steps and fetches the models of a modelstate server.",
               "modelstate");
  app.add_option("--server", context.server,
                 "HOST:PORT of the server, or several with commas between: the "
                 "first that answers")
      ->envname("MODELSTATE_SERVER")
      ->capture_default_str();
  app.add_option("--transport-profile", context.transport_profile,
                 "lan (near the server: fixed buffers, no pacing), wan (sockets as the host sets "
                 "them up), or auto: lan for a server on this host")
      ->envname("MODELSTATE_TRANSPORT_PROFILE")
      ->check(CLI::IsMember({"auto", "lan", "wan"}))
      ->capture_default_str();
  app.add_flag("--json", context.json, "One JSON document on stdout, for programs");
  app.require_subcommand(1);
  app.fallthrough();
  app.footer(kFooter);
  modelstate::cli::AddModuleCommands(&app, &context);
  modelstate::cli::AddSpecCommands(&app, &context);
  CLI::App* optim = modelstate::cli::AddOptimizerCommands(&app, &context);
  modelstate::cli::AddOptimizerFileCommands(optim, &context);
  modelstate::cli::AddTensorCommands(&app, optim, &context);
  modelstate::cli::AddCatCommand(&app, &context);
  modelstate::cli::AddStepCommands(&app, &context);
  modelstate::cli::AddTransferCommands(&app, &context);
  modelstate::cli::AddFollowCommand(&app, &context);
  modelstate::cli::AddDiffCommand(&app, &context);
  modelstate::cli::AddCheckpointCommands(&app, &context);
  modelstate::cli::AddBenchCommand(&app, &context);
  modelstate::cli::AddInspectCommand(&app, &context);
  modelstate::cli::AddVerifyCommand(&app, &context);
  modelstate::cli::AddConvertCommand(&app, &context);
  modelstate::cli::AddCompletionCommand(&app, &context);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? modelstate::cli::kSuccess : modelstate::cli::kUsage;
  }
  return context.exit_code;
}
