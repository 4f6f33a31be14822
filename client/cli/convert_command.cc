#include <iostream>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "common/base/status.h"
#include "common/format/convert_checkpoint.h"
#include "common/format/open_path.h"

namespace modelstate::cli {
namespace {

struct ConvertArguments {
  std::string in;
  std::string out;
  std::string to;
  std::string state_dict_key;
  ConvertOptions options;
};

absl::Status Convert(const Context& context, ConvertArguments arguments) {
  if (arguments.to.empty() && arguments.options.max_shard_bytes == 0) {
    for (const char* extension : {".pt", ".pth", ".bin"}) {
      if (absl::EndsWith(arguments.out, extension)) arguments.to = "pt";
    }
    if (arguments.to.empty() && !absl::EndsWith(arguments.out, ".safetensors")) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("\"", arguments.out,
                                    "\" does not say which format is meant; give --to "
                                    "safetensors or --to pt"),
                       {{"field", "to"}});
    }
  }
  arguments.options.in = arguments.in;
  arguments.options.to_torch = arguments.to == "pt";
  arguments.options.gate = [&context] { return context.CheckNotInterrupted(); };
  MS_ASSIGN_OR_RETURN(
      const std::unique_ptr<CheckpointReader> reader,
      OpenCheckpointPath(arguments.in, arguments.state_dict_key, /*allow_opaque=*/true));
  MS_ASSIGN_OR_RETURN(const ConvertResult result,
                      ConvertCheckpoint(*reader, arguments.out, arguments.options));
  const char* from = CheckpointFormatName(reader->format());
  const char* to = arguments.options.to_torch ? "torch zip" : "safetensors";
  if (context.json) {
    Context::Print({{"out", arguments.out},
                    {"from", from},
                    {"to", to},
                    {"tensors", result.tensors},
                    {"tied_names", result.tied_names},
                    {"bytes", result.bytes},
                    {"files", result.files}});
    return absl::OkStatus();
  }
  std::cout << "converted " << Counted(result.tensors, "tensor") << " (" << HumanBytes(result.bytes)
            << ") from " << from << " to " << to << " in " << Counted(result.files, "file") << ": "
            << Printable(arguments.out) << "\n";
  return absl::OkStatus();
}

}  // namespace

void AddConvertCommand(CLI::App* app, Context* context) {
  auto convert = std::make_shared<ConvertArguments>();
  CLI::App* command =
      app->add_subcommand("convert", "Write a checkpoint file in another format, without a server");
  command->footer(
      "IN is a file, an index of a sharded checkpoint, or a folder that holds one of them.\n"
      "OUT appears whole or not at all; until then it is OUT.<number>.tmp. A .pt file has the "
      "state_dict alone: plain tensors.");
  command->group(kTransferGroup);
  command->add_option("IN", convert->in)->required();
  command->add_option("OUT", convert->out, "A file; with --max-shard-size a folder")->required();
  command->add_option("--to", convert->to, "Else by the ending of OUT")
      ->check(CLI::IsMember({"safetensors", "pt"}));
  command
      ->add_option("--max-shard-size", convert->options.max_shard_bytes,
                   "Write shards of at most so many bytes, as 5GB or 500MiB, and their index")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->transform(WholeNumber<uint64_t>())  // looks first
      ->check(Positive());
  command->add_option("--state-dict-key", convert->state_dict_key,
                      "Where in a nested PyTorch file the state_dict is, as ema.model");
  command->add_flag("--force", convert->options.force, "Replace what is at OUT");
  command->callback([context, convert] { context->Finish(Convert(*context, *convert)); });
}

}  // namespace modelstate::cli
