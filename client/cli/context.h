#ifndef MODELSTATE_CLIENT_CLI_CONTEXT_H_
#define MODELSTATE_CLIENT_CLI_CONTEXT_H_

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"

namespace modelstate::cli {

// In the order in which fields are set, as people read them.
using Json = nlohmann::ordered_json;

// What each exit code says; also in --help.
enum ExitCode {
  kSuccess = 0,
  kDifferent = 1,
  kUsage = 2,
  kNotFound = 3,
  kRefused = 4,
  kUnavailable = 5,
  kCorrupt = 6,
  kInterrupted = 130,
};
ExitCode ExitCodeOf(const absl::Status& status);

// The global options, and what every command needs. One per process.
struct Context {
  std::string server = "localhost:50051";
  std::string transport_profile = "auto";
  bool json = false;
  // Cancelled by SIGINT and SIGTERM.
  client::Cancellation* interrupt = nullptr;
  // CANCELLED once it is: for what reads files and makes no call.
  absl::Status CheckNotInterrupted() const;
  int exit_code = kSuccess;

  absl::StatusOr<Client> Connect() const;

  // Ends a command: reports an error, to stderr or as {"error": ...}, and sets the exit code.
  void Finish(const absl::Status& status);
  // One JSON document on stdout.
  static void Print(const Json& document);
};

// Each adds its commands to `app`, in groups of --help; `context` outlives it.
void AddModuleCommands(CLI::App* app, Context* context);  // ls info move rm watch history
void AddSpecCommands(CLI::App* app, Context* context);    // create spec
// params buffers stats freeze unfreeze; state of `optim`
void AddTensorCommands(CLI::App* app, CLI::App* optim, Context* context);
void AddCatCommand(CLI::App* app, Context* context);        // cat
void AddDiffCommand(CLI::App* app, Context* context);       // diff
void AddTransferCommands(CLI::App* app, Context* context);  // fetch pin
void AddStepCommands(CLI::App* app, Context* context);      // step-from push
// `optim` with show, set and groups. Others add to it what belongs there.
CLI::App* AddOptimizerCommands(CLI::App* app, Context* context);
void AddOptimizerFileCommands(CLI::App* optim, Context* context);  // export import
void AddCheckpointCommands(CLI::App* app, Context* context);       // load save checkpoints
void AddFollowCommand(CLI::App* app, Context* context);            // follow
void AddBenchCommand(CLI::App* app, Context* context);             // bench
void AddConvertCommand(CLI::App* app, Context* context);           // convert
void AddInspectCommand(CLI::App* app, Context* context);           // inspect
void AddVerifyCommand(CLI::App* app, Context* context);            // verify
// The scripts are made from all commands of `app`: add it last.
void AddCompletionCommand(CLI::App* app, Context* context);

// --lr, --weight-decay and all others; what is given is set in `h`, which outlives `command`.
void AddHyperparameterOptions(CLI::App* command, Hyperparameters* h);

inline constexpr char kModulesGroup[] = "Modules";
inline constexpr char kTensorsGroup[] = "Parameters and buffers";
inline constexpr char kTrainingGroup[] = "Training";
inline constexpr char kTransferGroup[] = "Snapshots and files";
inline constexpr char kShellGroup[] = "Shell";

}  // namespace modelstate::cli

#endif  // MODELSTATE_CLIENT_CLI_CONTEXT_H_
