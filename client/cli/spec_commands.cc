#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "client/files/spec_file.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct CreateArguments {
  std::string module;
  std::string file;
  std::string device;
  std::optional<uint64_t> seed;
  std::vector<std::string> metadata;
};

absl::StatusOr<client::ModuleSpec> ReadSpec(const std::string& path) {
  std::string text;
  if (path == "-") {
    text.assign(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
    return client::ParseModuleSpec(text, client::GuessSpecFormat("", text), "stdin");
  }
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return MakeError(Reason::kInvalidField, absl::StrCat(path, " is a folder: name the file in it"),
                     {{"field", "spec"}});
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": there is no such file to read"));
  text.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (file.bad()) return absl::DataLossError(absl::StrCat(path, ": it cannot be read"));
  return client::ParseModuleSpec(text, client::GuessSpecFormat(path, text), path);
}

absl::Status Create(const Context& context, const CreateArguments& arguments) {
  client::ModuleSpec spec;
  if (!arguments.file.empty()) {
    MS_ASSIGN_OR_RETURN(spec, ReadSpec(arguments.file));
  }
  if (arguments.seed) spec.seed = *arguments.seed;
  for (const std::string& entry : arguments.metadata) {
    const size_t equals = entry.find('=');
    spec.metadata[entry.substr(0, equals)] = entry.substr(equals + 1);
  }
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(
      const client::ModuleInfo module,
      client.CreateModule(arguments.module, spec, arguments.device, context.interrupt));
  if (context.json) {
    Context::Print(ToJson(module));
  } else if (module.state == client::ModuleState::kEmpty) {
    std::cout << "created " << Printable(module.name) << " on " << module.device
              << ", empty: load a checkpoint into it\n";
  } else {
    std::cout << "created " << Printable(module.name) << " on " << module.device << ": "
              << Counted(module.parameter_count, "parameter") << ", "
              << Counted(module.buffer_count, "buffer") << ", " << HumanBytes(module.total_bytes)
              << ", version " << module.version.number << "\n";
  }
  return absl::OkStatus();
}

struct SpecArguments {
  std::string module;
  std::string out;
  bool textproto = false;
};

absl::Status Spec(const Context& context, const SpecArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::ModuleSpec spec, client.GetModuleSpec(arguments.module));
  const std::string text = client::FormatModuleSpec(
      spec, arguments.textproto ? client::SpecFormat::kTextProto : client::SpecFormat::kJson);
  if (arguments.out.empty()) {
    std::cout << text << std::flush;
    return absl::OkStatus();
  }
  std::ofstream file(arguments.out, std::ios::binary | std::ios::trunc);
  file << text << std::flush;
  if (!file) return absl::InternalError(absl::StrCat(arguments.out, ": it cannot be written"));
  if (context.json) {
    Context::Print(
        {{"module", arguments.module}, {"file", arguments.out}, {"tensors", spec.tensors.size()}});
  } else {
    std::cout << "wrote the spec of " << Printable(arguments.module) << " with "
              << Counted(spec.tensors.size(), "tensor") << " to " << arguments.out << "\n";
  }
  return absl::OkStatus();
}

}  // namespace

void AddSpecCommands(CLI::App* app, Context* context) {
  auto create = std::make_shared<CreateArguments>();
  CLI::App* command = app->add_subcommand(
      "create", "Make a module from a spec of parameters and buffers, or an empty one to load");
  command->group(kModulesGroup);
  command->add_option("MODULE", create->module)->required();
  command->add_option("--spec", create->file,
                      "A modelstate.v1.ModuleSpec as JSON or text proto, as `modelstate spec` "
                      "prints it; - is stdin");
  command->add_option("--device", create->device,
                      "A device that `modelstate info` lists; default: the server's first");
  command->add_option("--seed", create->seed, "Of random initializers, in place of the spec's")
      ->check(WholeNumber<uint64_t>());
  command
      ->add_option("--metadata", create->metadata,
                   "KEY=VALUE that checkpoints keep; adds to the spec's")
      ->allow_extra_args(false)
      ->check(CLI::Validator(
          [](const std::string& text) {
            const size_t equals = text.find('=');
            const bool valid = equals != std::string::npos && equals > 0;
            return valid ? std::string() : "metadata is written as KEY=VALUE";
          },
          "KEY=VALUE"));
  command->callback([context, create] { context->Finish(Create(*context, *create)); });

  auto spec = std::make_shared<SpecArguments>();
  command = app->add_subcommand(
      "spec", "Print the spec of a module, without its values, as `modelstate create` takes it");
  command->group(kModulesGroup);
  command->add_option("MODULE", spec->module)->required();
  command->add_flag("--textproto", spec->textproto, "As text proto instead of JSON");
  command->add_option("--out", spec->out, "Write it to this file");
  command->callback([context, spec] { context->Finish(Spec(*context, *spec)); });
}

}  // namespace modelstate::cli
