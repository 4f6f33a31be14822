#include <iostream>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/digest.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

enum class Which { kParameters, kBuffers, kOptimizerState };

struct ListArguments {
  std::string module;
  Which which = Which::kParameters;
  std::string view;
  client::ListOptions options;
};

absl::StatusOr<client::TensorList> ListOf(const Client& client, Which which,
                                          const std::string& module,
                                          const client::ListOptions& options) {
  switch (which) {
    case Which::kBuffers:
      return client.ListBuffers(module, options);
    case Which::kOptimizerState:
      return client.ListOptimizerState(module, options);
    case Which::kParameters:
      break;
  }
  return client.ListParameters(module, options);
}

void AddSelection(CLI::App* command, Selection* selection) {
  command->add_option("--names", selection->names, "Only this; repeatable")
      ->allow_extra_args(false);
  command->add_option("--prefix", selection->prefixes, "Only names that begin so; repeatable")
      ->allow_extra_args(false);
  command
      ->add_option("--glob", selection->globs,
                   "Only names that match; * matches dots too; repeatable")
      ->allow_extra_args(false);
}

void PrintList(const ListArguments& arguments, const client::TensorList& list) {
  const bool digests = arguments.options.digests;
  std::vector<std::string> header = {"NAME"};
  if (arguments.which == Which::kOptimizerState) header.push_back("SLOT");
  for (const char* column : {"DTYPE", "SHAPE", "SIZE"}) header.push_back(column);
  if (arguments.which == Which::kParameters) header.push_back("REQUIRES_GRAD");
  if (arguments.which == Which::kBuffers) header.push_back("PERSISTENT");
  if (arguments.which != Which::kOptimizerState) header.push_back("CHANGED");
  if (digests) header.push_back("XXH3");
  Table table(header);
  uint64_t bytes = 0;
  uint64_t tied_names = 0;
  for (const client::TensorInfo& tensor : list.tensors) {
    std::vector<std::string> row = {
        tensor.spec.is_alias() ? absl::StrCat(tensor.spec.name, " = ", tensor.spec.alias_of)
                               : tensor.spec.name};
    if (arguments.which == Which::kOptimizerState) row.push_back(tensor.slot);
    row.push_back(std::string(DTypeName(tensor.spec.dtype)));
    row.push_back(tensor.spec.shape.ToString());
    row.push_back(HumanBytes(tensor.spec.nbytes()));
    if (arguments.which == Which::kParameters) {
      row.push_back(tensor.spec.requires_grad ? "yes" : "no");
    }
    if (arguments.which == Which::kBuffers) row.push_back(tensor.spec.persistent ? "yes" : "no");
    if (arguments.which != Which::kOptimizerState) {
      row.push_back(absl::StrCat(tensor.changed_version));
    }
    if (digests) row.push_back(tensor.xxh3 ? DigestToHex(*tensor.xxh3) : "-");
    if (tensor.spec.is_alias()) {
      ++tied_names;
    } else {
      bytes += tensor.spec.nbytes();
    }
    table.Add(std::move(row));
  }
  table.Print();
  const uint64_t own = list.tensors.size() - tied_names;
  std::string count;
  switch (arguments.which) {
    case Which::kParameters:
      count = CountedParameters(own, tied_names);
      break;
    case Which::kBuffers:
      count = Counted(own, "buffer");
      if (tied_names > 0) absl::StrAppend(&count, " (", Counted(tied_names, "tied name"), ")");
      break;
    case Which::kOptimizerState:
      count = Counted(own, "tensor");
      break;
  }
  std::cout << count << ", " << HumanBytes(bytes) << ", version " << list.version.number
            << ", step " << list.step << "\n";
}

absl::Status List(const Context& context, ListArguments arguments) {
  if (arguments.view == "named") arguments.options.view = client::ListView::kNamed;
  if (arguments.view == "state_dict") arguments.options.view = client::ListView::kStateDict;
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::TensorList list,
                      ListOf(client, arguments.which, arguments.module, arguments.options));
  if (context.json) {
    Json tensors = Json::array();
    for (const client::TensorInfo& tensor : list.tensors) tensors.push_back(ToJson(tensor));
    Context::Print({{"version", ToJson(list.version)}, {"step", list.step}, {"tensors", tensors}});
  } else {
    PrintList(arguments, list);
  }
  return absl::OkStatus();
}

struct StatsArguments {
  std::string module;
  bool parameters = false;
  bool buffers = false;
  bool check = false;
  client::ListOptions options;
};

absl::Status Stats(Context* context, StatsArguments arguments) {
  arguments.options.statistics = true;
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  std::optional<client::TensorList> parameters;
  std::optional<client::TensorList> buffers;
  // A listing is of the newest version: once more where a step came between the two.
  for (int attempts = 0; attempts < 2; ++attempts) {
    if (!arguments.buffers) {
      MS_ASSIGN_OR_RETURN(parameters,
                          ListOf(client, Which::kParameters, arguments.module, arguments.options));
    }
    if (!arguments.parameters) {
      MS_ASSIGN_OR_RETURN(buffers,
                          ListOf(client, Which::kBuffers, arguments.module, arguments.options));
    }
    if (!parameters || !buffers || parameters->version == buffers->version) break;
  }
  const Version first = parameters ? parameters->version : buffers->version;
  const Version version = buffers ? buffers->version : parameters->version;
  const uint64_t step = buffers ? buffers->step : parameters->step;
  std::vector<client::TensorInfo> tensors;
  for (std::optional<client::TensorList>* list : {&parameters, &buffers}) {
    if (!*list) continue;
    for (client::TensorInfo& tensor : (*list)->tensors) tensors.push_back(std::move(tensor));
  }
  uint64_t nonfinite = 0;
  for (const client::TensorInfo& tensor : tensors) {
    if (tensor.statistics && !tensor.spec.is_alias()) nonfinite += tensor.statistics->nonfinite;
  }
  if (arguments.check && nonfinite > 0) context->exit_code = kDifferent;
  if (context->json) {
    Json list = Json::array();
    for (const client::TensorInfo& tensor : tensors) list.push_back(ToJson(tensor));
    Json json = {{"version", ToJson(version)}};
    if (parameters) json["parameters_version"] = ToJson(parameters->version);
    if (buffers) json["buffers_version"] = ToJson(buffers->version);
    json["step"] = step;
    json["nonfinite"] = nonfinite;
    json["tensors"] = list;
    Context::Print(json);
    return absl::OkStatus();
  }
  std::vector<std::string> header = {"NAME", "DTYPE", "SHAPE", "MIN",
                                     "MAX",  "MEAN",  "NORM",  "NON-FINITE"};
  if (arguments.options.digests) header.push_back("XXH3");
  Table table(header);
  for (const client::TensorInfo& tensor : tensors) {
    std::vector<std::string> row = {tensor.spec.name, std::string(DTypeName(tensor.spec.dtype)),
                                    tensor.spec.shape.ToString()};
    const client::TensorStatistics statistics =
        tensor.statistics.value_or(client::TensorStatistics());
    // Of nothing, or of nothing finite, there is no minimum.
    const bool some = statistics.count > statistics.nonfinite;
    for (double value : {statistics.min, statistics.max, statistics.mean, statistics.norm}) {
      row.push_back(some ? Number(value) : "-");
    }
    row.push_back(tensor.statistics ? absl::StrCat(statistics.nonfinite) : "-");
    if (arguments.options.digests) row.push_back(tensor.xxh3 ? DigestToHex(*tensor.xxh3) : "-");
    table.Add(std::move(row));
  }
  table.Print();
  std::cout << Counted(tensors.size(), "tensor") << ", " << nonfinite
            << " non-finite elements, version ";
  // Parameters and buffers are listed one after the other, while steps go on.
  if (first != version) std::cout << first.number << " to ";
  std::cout << version.number << ", step " << step << "\n";
  return absl::OkStatus();
}

struct FreezeArguments {
  std::string module;
  std::vector<std::string> patterns;
  Selection selection;  // with the other options
};

absl::Status SetRequiresGrad(const Context& context, const FreezeArguments& arguments,
                             bool requires_grad) {
  Selection selection = arguments.selection;
  for (const std::string& pattern : arguments.patterns) {
    const bool glob = pattern.find_first_of("*?[") != std::string::npos;
    (glob ? selection.globs : selection.names).push_back(pattern);
  }
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const uint64_t changed,
                      client.SetRequiresGrad(arguments.module, selection, requires_grad));
  if (context.json) {
    Context::Print({{"changed", changed}});
  } else {
    std::cout << (requires_grad ? "unfroze " : "froze ") << Counted(changed, "parameter") << " of "
              << Printable(arguments.module) << "\n";
  }
  return absl::OkStatus();
}

CLI::App* AddList(CLI::App* app, Context* context, const char* name, const char* what,
                  Which which) {
  auto arguments = std::make_shared<ListArguments>();
  arguments->which = which;
  CLI::App* command = app->add_subcommand(name, what);
  if (which != Which::kOptimizerState) command->group(kTensorsGroup);
  command->add_option("MODULE", arguments->module)->required();
  command->add_flag("--digests", arguments->options.digests, "Show the XXH3 of each");
  AddSelection(command, &arguments->options.selection);
  if (which != Which::kOptimizerState) {
    command
        ->add_option("--view", arguments->view,
                     which == Which::kParameters
                         ? "named: as named_parameters(), of tied names the first; state_dict: as "
                           "state_dict(). Without it every registered name"
                         : "named: as named_buffers(), of tied names the first; state_dict: as "
                           "state_dict(), persistent ones. Without it every registered name")
        ->check(CLI::IsMember({"named", "state_dict"}));
  }
  command->callback([context, arguments] { context->Finish(List(*context, *arguments)); });
  return command;
}

void AddFreeze(CLI::App* app, Context* context, const char* name, const char* what,
               bool requires_grad) {
  auto arguments = std::make_shared<FreezeArguments>();
  CLI::App* command = app->add_subcommand(name, what)->group(kTensorsGroup);
  command->add_option("MODULE", arguments->module)->required();
  // CLI11 reads [a] as a list where a positional takes several values; the options have one each.
  command->add_option("PATTERN", arguments->patterns,
                      "Names, or globs (with *, ? or [; buffers that match stay as they are). One "
                      "that begins with [ and ends with ] is read as a list: give it with --names "
                      "or --glob");
  AddSelection(command, &arguments->selection);
  command->callback([context, arguments, requires_grad] {
    if (arguments->patterns.empty() && arguments->selection.everything()) {
      throw CLI::RequiredError("PATTERN, --names, --prefix or --glob (\"*\": all parameters)");
    }
    context->Finish(SetRequiresGrad(*context, *arguments, requires_grad));
  });
}

}  // namespace

void AddTensorCommands(CLI::App* app, CLI::App* optim, Context* context) {
  AddList(app, context, "params", "List a module's parameters", Which::kParameters);
  AddList(app, context, "buffers", "List a module's buffers", Which::kBuffers);

  auto stats = std::make_shared<StatsArguments>();
  CLI::App* command =
      app->add_subcommand("stats", "Minimum, maximum, mean, norm and non-finite count of tensors");
  command->group(kTensorsGroup);
  command->add_option("MODULE", stats->module)->required();
  CLI::Option* params = command->add_flag("--params", stats->parameters, "Only parameters");
  command->add_flag("--buffers", stats->buffers, "Only buffers")->excludes(params);
  AddSelection(command, &stats->options.selection);
  command->add_flag("--digests", stats->options.digests, "Show the XXH3 of each");
  command->add_flag("--check", stats->check, "Exit with 1 when an element is not finite");
  command->callback([context, stats] { context->Finish(Stats(context, *stats)); });

  AddFreeze(app, context, "freeze", "Freeze parameters: requires_grad becomes false", false);
  AddFreeze(app, context, "unfreeze", "Unfreeze parameters: requires_grad becomes true", true);
  AddList(optim, context, "state", "List the optimizer's state, per parameter and slot",
          Which::kOptimizerState);
}

}  // namespace modelstate::cli
