#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "client/files/optimizer_file.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

constexpr char kOrderHelp[] =
    "A file of parameter names, one a line, in the order that torch's optimizer has them, group "
    "after group; without it named_parameters()";

struct Arguments {
  std::string module;
  std::string file;
  std::string order;
  std::string algorithm;
  std::optional<uint64_t> step;
};

absl::StatusOr<std::vector<std::string>> ReadOrder(const std::string& path) {
  if (path.empty()) return std::vector<std::string>();
  MS_ASSIGN_OR_RETURN(const File file, OpenForRead(path));
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(file.ReadAt(0, {reinterpret_cast<uint8_t*>(text.data()), text.size()}));
  std::vector<std::string> names;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    line = absl::StripAsciiWhitespace(line);
    if (!line.empty()) names.emplace_back(line);
  }
  if (!names.empty()) return names;
  return MakeError(Reason::kInvalidField, absl::StrCat(path, " has no names; one a line is due"),
                   {{"field", "order"}});
}

// What the library asks for, as an option of this command.
absl::Status WithOptions(const absl::Status& status) {
  const std::optional<Reason> reason = GetReason(status);
  if (!reason) return status;
  return MakeError(*reason,
                   absl::StrReplaceAll(status.message(),
                                       {{"give the order", "give the order (--order FILE)"},
                                        {"give the algorithm", "give the algorithm (--algorithm)"},
                                        {"leave the algorithm out", "leave --algorithm out"}}),
                   GetErrorMetadata(status));
}

absl::Status Export(const Context& context, const Arguments& arguments) {
  MS_ASSIGN_OR_RETURN(const std::vector<std::string> order, ReadOrder(arguments.order));
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::OptimizerInfo optimizer, client.GetOptimizer(arguments.module));
  MS_ASSIGN_OR_RETURN(const client::TensorList parameters, client.ListParameters(arguments.module));
  client::FetchOptions options;
  options.optimizer_state = true;
  options.selection.kinds = {TensorKind::kOptimizerState};
  ProgressBar bar(context);
  options.progress = bar.callback();
  absl::StatusOr<client::StateDict> state =
      client.Fetch(arguments.module, options, context.interrupt);
  bar.Clear();
  if (!state.ok()) return state.status();
  std::vector<client::TensorRef> refs;
  for (size_t i = 0; i < state->size(); ++i) refs.push_back({state->specs()[i], state->bytes(i)});
  MS_ASSIGN_OR_RETURN(
      const client::WriteOptimizerResult result,
      client::WriteOptimizerFile(arguments.file, optimizer, parameters.tensors, refs, order));
  const std::string algorithm = absl::AsciiStrToUpper(AlgorithmName(optimizer.config.algorithm));
  if (context.json) {
    Context::Print({{"module", arguments.module},
                    {"file", arguments.file},
                    {"algorithm", algorithm},
                    {"groups", result.groups},
                    {"parameters", result.parameters},
                    {"tensors", result.tensors},
                    {"step", state->step()},
                    {"version", ToJson(state->version())},
                    {"order", result.order}});
    return absl::OkStatus();
  }
  std::cout << "wrote " << Printable(arguments.file) << ": " << algorithm << " at step "
            << state->step() << ", " << Counted(result.groups, "group") << " of "
            << Counted(result.parameters, "parameter") << ", " << Counted(result.tensors, "tensor")
            << " of state\n";
  return absl::OkStatus();
}

absl::Status Import(const Context& context, const Arguments& arguments) {
  client::ReadOptimizerOptions options;
  MS_ASSIGN_OR_RETURN(options.order, ReadOrder(arguments.order));
  if (!arguments.algorithm.empty()) {
    options.algorithm = ParseAlgorithm(absl::AsciiStrToLower(arguments.algorithm));
  }
  options.step = arguments.step;
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  absl::StatusOr<client::OptimizerInfo> current = client.GetOptimizer(arguments.module);
  if (current.ok()) {
    options.current = *std::move(current);
  } else if (GetReason(current.status()) != Reason::kNoOptimizer) {
    return current.status();
  }
  MS_ASSIGN_OR_RETURN(const client::TensorList parameters, client.ListParameters(arguments.module));
  const absl::StatusOr<client::OptimizerFile> opened =
      client::OptimizerFile::Read(arguments.file, parameters.tensors, options);
  if (!opened.ok()) return WithOptions(opened.status());
  const client::OptimizerFile& file = *opened;
  client::LoadOptimizerStateOptions load;
  load.optimizer = file.config();
  load.base = parameters.version;  // that the names are of
  load.step = file.step();
  MS_ASSIGN_OR_RETURN(
      const client::OptimizerInfo optimizer,
      client.LoadOptimizerState(arguments.module, file.refs(), load, context.interrupt));
  const std::string algorithm = absl::AsciiStrToUpper(AlgorithmName(optimizer.config.algorithm));
  if (context.json) {
    Context::Print({{"module", arguments.module},
                    {"file", arguments.file},
                    {"algorithm", algorithm},
                    {"groups", optimizer.groups.size()},
                    {"tensors", file.refs().size()},
                    {"step", optimizer.step},
                    {"state_bytes", optimizer.state_bytes},
                    {"version", ToJson(optimizer.version)}});
    return absl::OkStatus();
  }
  std::cout << "loaded " << Printable(arguments.file) << " into " << Printable(arguments.module)
            << ": " << algorithm << " at step " << optimizer.step << ", "
            << Counted(optimizer.groups.size(), "group") << ", "
            << HumanBytes(optimizer.state_bytes) << " of state\n";
  return absl::OkStatus();
}

}  // namespace

void AddOptimizerFileCommands(CLI::App* optim, Context* context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* write = optim->add_subcommand(
      "export", "Write a file that torch.load and optimizer.load_state_dict take");
  CLI::App* read = optim->add_subcommand(
      "import", "Configure and fill the optimizer from torch.save(optimizer.state_dict(), FILE)");
  for (CLI::App* command : {write, read}) {
    command->add_option("MODULE", arguments->module)->required();
    command->add_option("FILE", arguments->file)->required();
    command->add_option("--order", arguments->order, kOrderHelp);
  }
  std::vector<std::string> names;
  for (Algorithm algorithm : AllAlgorithms()) names.push_back(AlgorithmName(algorithm));
  read->add_option("--algorithm", arguments->algorithm,
                   "What wrote the file; needed where its keys do not say, refused where they say "
                   "otherwise")
      ->check(CLI::IsMember(names, CLI::ignore_case));
  read->add_option("--step", arguments->step, "Steps so far, where the file counts none (SGD)")
      ->check(WholeNumber<uint64_t>());
  write->callback([context, arguments] { context->Finish(Export(*context, *arguments)); });
  read->callback([context, arguments] { context->Finish(Import(*context, *arguments)); });
}

}  // namespace modelstate::cli
