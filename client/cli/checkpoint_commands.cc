#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct LoadArguments {
  std::string module;
  std::string path;
  bool no_strict = false;
  client::LoadCheckpointOptions options;
};

absl::Status Load(const Context& context, LoadArguments arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  arguments.options.load.strict = !arguments.no_strict;
  ProgressBar bar(context);
  MS_ASSIGN_OR_RETURN(const client::LoadCheckpointResult result,
                      client.LoadCheckpoint(arguments.module, arguments.path, arguments.options,
                                            bar.callback(), context.interrupt));
  bar.Clear();
  const client::ModuleInfo& module = result.load.module;
  if (context.json) {
    Json decisions = Json::array();
    for (const client::KindDecision& decision : result.load.decisions) {
      decisions.push_back({{"rule", decision.rule},
                           {"parameters", decision.parameters},
                           {"buffers", decision.buffers}});
    }
    Context::Print({{"module", ToJson(module)},
                    {"format", result.format},
                    {"loaded", result.load.loaded},
                    {"read_bytes", result.read_bytes},
                    {"optimizer_loaded", result.optimizer_loaded},
                    {"decisions", decisions},
                    {"missing_keys", result.load.missing_keys},
                    {"unexpected_keys", result.load.unexpected_keys},
                    {"missing_count", result.load.missing_count},
                    {"unexpected_count", result.load.unexpected_count}});
    return absl::OkStatus();
  }
  std::cout << "loaded " << result.load.loaded << " tensors (" << HumanBytes(result.read_bytes)
            << ", " << result.format << ") into " << module.name << ": " << module.parameter_count
            << " parameters, " << module.buffer_count << " buffers, version "
            << module.version.number << (result.optimizer_loaded ? ", with its optimizer" : "")
            << "\n";
  if (!result.load.decisions.empty()) {
    Table table({"DECIDED BY", "PARAMETERS", "BUFFERS"});
    for (const client::KindDecision& decision : result.load.decisions) {
      table.Add({decision.rule, absl::StrCat(decision.parameters), absl::StrCat(decision.buffers)});
    }
    table.Print();
  }
  if (result.load.missing_count > 0) {
    std::cout << "missing: " << QuotedList(result.load.missing_keys) << "\n";
  }
  if (result.load.unexpected_count > 0) {
    std::cout << "unexpected: " << QuotedList(result.load.unexpected_keys) << "\n";
  }
  return absl::OkStatus();
}

Json CheckpointJson(const client::CheckpointInfo& checkpoint) {
  Json json = {{"path", checkpoint.path},
               {"format", checkpoint.format},
               {"bytes", checkpoint.nbytes},
               {"create_time", absl::FormatTime(checkpoint.create_time, absl::UTCTimeZone())}};
  if (!checkpoint.module.empty()) {
    json["module"] = checkpoint.module;
    json["version"] = ToJson(checkpoint.version);
    json["step"] = checkpoint.step;
    json["tensors"] = checkpoint.tensor_count;
    json["has_optimizer"] = checkpoint.has_optimizer;
  }
  json["files"] = Json::array();
  for (const client::CheckpointFile& file : checkpoint.files) {
    json["files"].push_back({{"name", file.name}, {"bytes", file.nbytes}});
  }
  if (checkpoint.verified) json["verified"] = *checkpoint.verified;
  if (!checkpoint.problem.empty()) json["problem"] = checkpoint.problem;
  return json;
}

struct SaveArguments {
  std::string module;
  std::string path;
  client::SaveCheckpointOptions options;
};

absl::Status Save(const Context& context, const SaveArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  ProgressBar bar(context);
  MS_ASSIGN_OR_RETURN(const client::CheckpointInfo checkpoint,
                      client.SaveCheckpoint(arguments.module, arguments.path, arguments.options,
                                            bar.callback(), context.interrupt));
  bar.Clear();
  if (context.json) {
    Context::Print(CheckpointJson(checkpoint));
  } else {
    std::cout << "saved version " << checkpoint.version.number << " (step " << checkpoint.step
              << ") of " << arguments.module << " to " << checkpoint.path << ": "
              << checkpoint.tensor_count << " tensors, " << HumanBytes(checkpoint.nbytes)
              << (checkpoint.has_optimizer ? ", with its optimizer" : "") << "\n";
  }
  return absl::OkStatus();
}

absl::Status List(Context* context, const std::string& directory, bool verify) {
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  MS_ASSIGN_OR_RETURN(const std::vector<client::CheckpointInfo> checkpoints,
                      client.ListCheckpoints(directory, verify));
  for (const client::CheckpointInfo& checkpoint : checkpoints) {
    if (checkpoint.verified && !*checkpoint.verified) context->exit_code = kDifferent;
  }
  if (context->json) {
    Json json = Json::array();
    for (const client::CheckpointInfo& checkpoint : checkpoints) {
      json.push_back(CheckpointJson(checkpoint));
    }
    Context::Print({{"checkpoints", json}});
    return absl::OkStatus();
  }
  Table table({"PATH", "FORMAT", "STEP", "SIZE", "CREATED", verify ? "VERIFIED" : "PROBLEM"});
  for (const client::CheckpointInfo& checkpoint : checkpoints) {
    std::string last = checkpoint.problem;
    if (verify && last.empty()) last = checkpoint.verified.value_or(false) ? "yes" : "no";
    table.Add({checkpoint.path, checkpoint.format,
               checkpoint.module.empty() ? "-" : absl::StrCat(checkpoint.step),
               HumanBytes(checkpoint.nbytes), HumanTime(checkpoint.create_time), last});
  }
  table.Print();
  return absl::OkStatus();
}

}  // namespace

void AddCheckpointCommands(CLI::App* app, Context* context) {
  auto load = std::make_shared<LoadArguments>();
  load->options.create_module = true;
  CLI::App* command =
      app->add_subcommand("load", "Load a checkpoint of the server's checkpoint root");
  command->add_option("MODULE", load->module)->required();
  command->add_option("PATH", load->path, "Relative to the checkpoint root")->required();
  command->add_flag("--create,!--no-create", load->options.create_module,
                    "Make the module when there is none (default)");
  command->add_option("--buffers", load->options.load.buffers,
                      "Globs of the keys that are buffers, into an empty module");
  command->add_flag("--no-strict", load->no_strict, "Allow missing and unexpected keys");
  command->add_flag("--assign", load->options.load.assign, "Take the dtypes of the file");
  command->add_option("--strip-prefix", load->options.load.strip_prefix,
                      "Remove this from the start of keys, as \"module.\"");
  command->add_option("--add-prefix", load->options.load.add_prefix, "Put this before keys");
  command->add_option("--key", load->options.state_dict_key,
                      "Where a nested PyTorch file has the state_dict, as \"ema.state_dict\"");
  command->add_flag("--weights-only", load->options.weights_only,
                    "Leave the optimizer of a checkpoint alone");
  command->callback([context, load] { context->Finish(Load(*context, *load)); });

  auto save = std::make_shared<SaveArguments>();
  command = app->add_subcommand("save", "Save a checkpoint under the server's checkpoint root");
  command->add_option("MODULE", save->module)->required();
  command->add_option("PATH", save->path, "Relative to the checkpoint root")->required();
  command->add_flag("--overwrite", save->options.overwrite, "Replace what is there");
  command->add_flag("--weights-only", save->options.weights_only, "Without optimizer state");
  command->callback([context, save] { context->Finish(Save(*context, *save)); });

  auto directory = std::make_shared<std::string>();
  auto verify = std::make_shared<bool>(false);
  command = app->add_subcommand("checkpoints", "List the checkpoints in a directory of the root");
  command->add_option("DIR", *directory);
  command->add_flag("--verify", *verify, "Read and check every byte; 1 when one is not as written");
  command->callback(
      [context, directory, verify] { context->Finish(List(context, *directory, *verify)); });
}

}  // namespace modelstate::cli
