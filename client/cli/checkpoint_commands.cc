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

void PrintDecisions(const client::LoadResult& load) {
  if (load.decisions.empty()) return;
  Table table({"DECIDED BY", "PARAMETERS", "BUFFERS"});
  for (const client::KindDecision& decision : load.decisions) {
    table.Add({decision.rule, absl::StrCat(decision.parameters), absl::StrCat(decision.buffers)});
  }
  table.Print();
}

// Every key, a line each.
void PrintKeys(const char* what, const std::vector<std::string>& keys) {
  if (keys.empty()) return;
  std::cout << Counted(keys.size(), what) << ":\n";
  for (const std::string& key : keys) std::cout << "  " << Printable(key) << "\n";
}

void PrintDryRun(const std::string& path, const client::LoadCheckpointResult& result,
                 bool refused) {
  PrintDecisions(result.load);
  PrintKeys("missing key", result.load.missing_keys);
  PrintKeys("unexpected key", result.load.unexpected_keys);
  PrintKeys("mismatch of size", result.load.size_mismatches);
  std::cout << Printable(path) << " (" << result.format << ") would "
            << (refused ? "be refused"
                        : absl::StrCat("load ", Counted(result.load.loaded, "tensor")))
            << "; nothing has changed\n";
}

absl::Status Load(Context* context, LoadArguments arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  arguments.options.load.strict = !arguments.no_strict;
  ProgressBar bar(*context);
  MS_ASSIGN_OR_RETURN(const client::LoadCheckpointResult result,
                      client.LoadCheckpoint(arguments.module, arguments.path, arguments.options,
                                            bar.callback(), context->interrupt));
  bar.Clear();
  const client::LoadResult& load = result.load;
  const client::ModuleInfo& module = load.module;
  const bool dry_run = arguments.options.load.dry_run;
  const bool refused = load.size_mismatch_count > 0 ||
                       (!arguments.no_strict && load.missing_count + load.unexpected_count > 0);
  if (dry_run && refused) context->exit_code = kDifferent;
  if (context->json) {
    Json decisions = Json::array();
    for (const client::KindDecision& decision : load.decisions) {
      decisions.push_back({{"rule", decision.rule},
                           {"parameters", decision.parameters},
                           {"buffers", decision.buffers}});
    }
    Json json = {{"module", ToJson(module)},
                 {"path", result.path},
                 {"format", result.format},
                 {"loaded", load.loaded},
                 {"read_bytes", result.read_bytes},
                 {"optimizer_loaded", result.optimizer_loaded},
                 {"decisions", decisions},
                 {"missing_keys", load.missing_keys},
                 {"unexpected_keys", load.unexpected_keys},
                 {"missing_count", load.missing_count},
                 {"unexpected_count", load.unexpected_count}};
    if (dry_run) {
      json["size_mismatches"] = load.size_mismatches;
      json["size_mismatch_count"] = load.size_mismatch_count;
      json["refused"] = refused;
    }
    Context::Print(json);
    return absl::OkStatus();
  }
  if (dry_run) {
    PrintDryRun(arguments.path, result, refused);
    return absl::OkStatus();
  }
  std::cout << "loaded " << Counted(load.loaded, "tensor") << " (" << HumanBytes(result.read_bytes)
            << ", " << result.format
            << (result.path == arguments.path ? "" : absl::StrCat(", ", Printable(result.path)))
            << ") into " << Printable(module.name) << ": "
            << Counted(module.parameter_count, "parameter") << ", "
            << Counted(module.buffer_count, "buffer") << ", version " << module.version.number
            << (result.optimizer_loaded ? ", with its optimizer" : "") << "\n";
  PrintDecisions(load);
  if (load.missing_count > 0) {
    std::cout << Counted(load.missing_count, "missing key") << ": "
              << Printable(QuotedList(load.missing_keys)) << "\n";
  }
  if (load.unexpected_count > 0) {
    std::cout << Counted(load.unexpected_count, "unexpected key") << ": "
              << Printable(QuotedList(load.unexpected_keys)) << "\n";
  }
  return absl::OkStatus();
}

std::string Verified(const client::CheckpointInfo& checkpoint) {
  if (!checkpoint.verified.value_or(false)) return "no";
  if (checkpoint.unverifiable_tensors == 0) return "yes";
  return absl::StrCat("read; no digest of ", Counted(checkpoint.unverifiable_tensors, "tensor"));
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
    json["weights_only"] = checkpoint.weights_only;
  }
  json["files"] = Json::array();
  for (const client::CheckpointFile& file : checkpoint.files) {
    json["files"].push_back({{"name", file.name}, {"bytes", file.nbytes}});
  }
  if (checkpoint.verified) json["verified"] = *checkpoint.verified;
  if (checkpoint.unverifiable_tensors > 0) {
    json["unverifiable_tensors"] = checkpoint.unverifiable_tensors;
  }
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
              << ") of " << Printable(arguments.module) << " to " << Printable(checkpoint.path)
              << ": " << checkpoint.tensor_count << " tensors, " << HumanBytes(checkpoint.nbytes)
              << (checkpoint.has_optimizer ? ", with its optimizer" : "") << "\n";
  }
  return absl::OkStatus();
}

absl::Status List(Context* context, const std::string& directory, bool verify, bool recursive) {
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  MS_ASSIGN_OR_RETURN(const std::vector<client::CheckpointInfo> checkpoints,
                      client.ListCheckpoints(directory, verify, recursive));
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
    if (verify && last.empty()) last = Verified(checkpoint);
    table.Add({checkpoint.path, checkpoint.format,
               checkpoint.module.empty() ? "-" : absl::StrCat(checkpoint.step),
               HumanBytes(checkpoint.nbytes), HumanTime(checkpoint.create_time), last});
  }
  table.Print();
  return absl::OkStatus();
}

absl::Status Delete(const Context& context, const std::string& path) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_RETURN_IF_ERROR(client.DeleteCheckpoint(path));
  if (context.json) {
    Context::Print({{"deleted", path}});
  } else {
    std::cout << "deleted " << Printable(path) << "\n";
  }
  return absl::OkStatus();
}

}  // namespace

void AddCheckpointCommands(CLI::App* app, Context* context) {
  auto load = std::make_shared<LoadArguments>();
  load->options.create_module = true;
  CLI::App* command =
      app->add_subcommand("load", "Load a checkpoint of the server's checkpoint root");
  command->group(kTransferGroup);
  command->add_option("MODULE", load->module)->required();
  command
      ->add_option("PATH", load->path,
                   "Relative to the checkpoint root; DIR/latest is the newest in DIR and below")
      ->required();
  command->add_flag("--create,!--no-create", load->options.create_module,
                    "Make the module when there is none (default)");
  command
      ->add_option("--buffers", load->options.load.buffers,
                   "Glob of the keys that are buffers, into an empty module; repeatable")
      ->allow_extra_args(false);
  command->add_flag("--no-strict", load->no_strict, "Allow missing and unexpected keys");
  command->add_flag("--dry-run", load->options.load.dry_run,
                    "Change nothing; print every missing and unexpected key and every shape that "
                    "does not fit; 1 when the load would be refused");
  command->add_flag("--assign", load->options.load.assign, "Take the dtypes of the file");
  command->add_option("--strip-prefix", load->options.load.strip_prefix,
                      "Remove this from the start of keys, as \"module.\"");
  command->add_option("--add-prefix", load->options.load.add_prefix, "Put this before keys");
  command->add_option("--state-dict-key", load->options.state_dict_key,
                      "Where a nested PyTorch file has the state_dict, as \"ema.state_dict\"");
  command->add_flag("--weights-only", load->options.weights_only,
                    "Leave the optimizer of a checkpoint alone");
  command->callback([context, load] { context->Finish(Load(context, *load)); });

  auto save = std::make_shared<SaveArguments>();
  command = app->add_subcommand("save", "Save a checkpoint under the server's checkpoint root");
  command->group(kTransferGroup);
  command->add_option("MODULE", save->module)->required();
  command->add_option("PATH", save->path, "Relative to the checkpoint root")->required();
  command->add_flag("--overwrite", save->options.overwrite, "Replace what is there");
  command->add_flag("--weights-only", save->options.weights_only, "Without optimizer state");
  command->callback([context, save] { context->Finish(Save(*context, *save)); });

  auto directory = std::make_shared<std::string>();
  auto verify = std::make_shared<bool>(false);
  auto recursive = std::make_shared<bool>(false);
  CLI::App* list = app->add_subcommand(
      "checkpoints", "List the checkpoints in a directory of the root, or delete one");
  list->group(kTransferGroup);
  list->add_option("DIR", *directory);
  list->add_flag("--verify", *verify, "Read and check every byte; 1 when one is not as written");
  CLI::App* remove = list->add_subcommand("delete", "Delete a checkpoint");
  list->add_flag("-r,--recursive", *recursive, "Also those in directories below");
  list->callback([context, remove, directory, verify, recursive] {
    if (remove->parsed()) return;
    context->Finish(List(context, *directory, *verify, *recursive));
  });
  auto path = std::make_shared<std::string>();
  remove->add_option("PATH", *path, "Relative to the checkpoint root")->required();
  remove->callback([context, path] { context->Finish(Delete(*context, *path)); });
}

}  // namespace modelstate::cli
