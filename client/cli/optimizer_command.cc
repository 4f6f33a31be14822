#include <iostream>
#include <memory>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct OptimizerArguments {
  std::string module;
  std::vector<std::string> groups;
  bool no_groups = false;
  bool adamw = false;
  bool sgd = false;
  bool reset_state = false;
  client::Hyperparameters hyperparameters;
  std::optional<double> max_grad_norm;
  std::optional<uint64_t> max_staleness;
};

// Each pair of hyper-parameter and name, once.
template <typename Params, typename Visitor>
void ForEach(Params& params, Visitor visit) {
  visit("lr", params.lr);
  visit("weight_decay", params.weight_decay);
  visit("maximize", params.maximize);
  visit("momentum", params.momentum);
  visit("dampening", params.dampening);
  visit("nesterov", params.nesterov);
  visit("beta1", params.beta1);
  visit("beta2", params.beta2);
  visit("eps", params.eps);
}

bool ParseValue(const std::string& text, std::optional<double>* value) {
  double number = 0;
  if (!absl::SimpleAtod(text, &number)) return false;
  *value = number;
  return true;
}
bool ParseValue(const std::string& text, std::optional<bool>* value) {
  bool truth = false;
  if (!absl::SimpleAtob(text, &truth)) return false;
  *value = truth;
  return true;
}

// NAME:GLOB[,GLOB...]:KEY=VALUE[,KEY=VALUE...]. An empty string, or what is wrong.
std::string ParseGroup(const std::string& text, client::ParameterGroup* group) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  if (parts.size() != 3) return "a group is written as NAME:GLOB,GLOB:lr=0.1,weight_decay=0";
  group->name = parts[0];
  group->selection.globs = absl::StrSplit(parts[1], ',', absl::SkipEmpty());
  if (group->selection.globs.empty()) return "a group needs a glob of its parameters";
  for (const std::string& setting :
       std::vector<std::string>(absl::StrSplit(parts[2], ',', absl::SkipEmpty()))) {
    const std::vector<std::string> pair = absl::StrSplit(setting, absl::MaxSplits('=', 1));
    bool found = false;
    bool valid = false;
    ForEach(group->hyperparameters, [&](const char* name, auto& value) {
      if (pair[0] != name) return;
      found = true;
      valid = pair.size() == 2 && ParseValue(pair[1], &value);
    });
    if (!found) return absl::StrCat("there is no hyper-parameter \"", pair[0], "\"");
    if (!valid) return absl::StrCat("\"", setting, "\" is not written as ", pair[0], "=VALUE");
  }
  return "";
}

Json ToJson(const client::Hyperparameters& params) {
  Json json = Json::object();
  ForEach(params, [&json](const char* name, const auto& value) {
    if (value) json[name] = *value;
  });
  return json;
}

void PrintOptimizer(const Context& context, const client::OptimizerInfo& info) {
  const char* algorithm = info.config.algorithm == client::Algorithm::kSgd     ? "SGD"
                          : info.config.algorithm == client::Algorithm::kAdamW ? "ADAMW"
                                                                               : "UNKNOWN";
  if (context.json) {
    Json groups = Json::array();
    for (const client::ParameterGroupInfo& group : info.groups) {
      groups.push_back({{"name", group.name},
                        {"parameters", group.parameter_count},
                        {"hyperparameters", ToJson(group.hyperparameters)}});
    }
    Json json = {{"algorithm", algorithm},
                 {"groups", groups},
                 {"step", info.step},
                 {"state_bytes", info.state_bytes},
                 {"version", cli::ToJson(info.version)}};
    if (info.config.max_grad_norm) json["max_grad_norm"] = *info.config.max_grad_norm;
    if (info.config.max_staleness) json["max_staleness"] = *info.config.max_staleness;
    Context::Print(json);
    return;
  }
  std::cout << algorithm << ", step " << info.step << ", " << HumanBytes(info.state_bytes)
            << " of state";
  if (info.config.max_grad_norm) std::cout << ", clipped to " << *info.config.max_grad_norm;
  std::cout << "\n";
  for (size_t i = 0; i < info.groups.size(); ++i) {
    const client::ParameterGroupInfo& group = info.groups[i];
    std::cout << "group " << i << (group.name.empty() ? "" : absl::StrCat(" \"", group.name, "\""))
              << ": " << Counted(group.parameter_count, "parameter");
    ForEach(group.hyperparameters, [](const char* name, const auto& value) {
      if (value) std::cout << std::boolalpha << ", " << name << " " << *value;
    });
    std::cout << "\n";
  }
}

absl::Status Optimizer(const Context& context, const OptimizerArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  bool change = arguments.adamw || arguments.sgd || arguments.reset_state ||
                arguments.max_grad_norm || arguments.max_staleness || arguments.no_groups ||
                !arguments.groups.empty();
  ForEach(arguments.hyperparameters,
          [&change](const char*, const auto& value) { change |= value.has_value(); });
  absl::StatusOr<client::OptimizerInfo> current = absl::NotFoundError("");
  if (!arguments.adamw && !arguments.sgd) {
    current = client.GetOptimizer(arguments.module);
    if (!current.ok()) return current.status();
    if (!change) {
      PrintOptimizer(context, *current);
      return absl::OkStatus();
    }
  }
  // Without an algorithm the current configuration is changed in part.
  client::OptimizerConfig config = current.ok() ? current->config : client::OptimizerConfig();
  if (arguments.adamw) config.algorithm = client::Algorithm::kAdamW;
  if (arguments.sgd) config.algorithm = client::Algorithm::kSgd;
  client::Hyperparameters& to = config.hyperparameters;
  const client::Hyperparameters& from = arguments.hyperparameters;
  if (from.lr) to.lr = from.lr;
  if (from.weight_decay) to.weight_decay = from.weight_decay;
  if (from.maximize) to.maximize = from.maximize;
  if (from.momentum) to.momentum = from.momentum;
  if (from.dampening) to.dampening = from.dampening;
  if (from.nesterov) to.nesterov = from.nesterov;
  if (from.beta1) to.beta1 = from.beta1;
  if (from.beta2) to.beta2 = from.beta2;
  if (from.eps) to.eps = from.eps;
  if (arguments.no_groups || !arguments.groups.empty()) config.groups.clear();
  for (const std::string& text : arguments.groups) {
    ParseGroup(text, &config.groups.emplace_back());  // checked as it was given
  }
  if (arguments.max_grad_norm) config.max_grad_norm = arguments.max_grad_norm;
  if (arguments.max_staleness) config.max_staleness = arguments.max_staleness;
  MS_ASSIGN_OR_RETURN(const client::OptimizerInfo info,
                      client.ConfigureOptimizer(arguments.module, config, arguments.reset_state));
  PrintOptimizer(context, info);
  return absl::OkStatus();
}

}  // namespace

void AddOptimizerCommand(CLI::App* app, Context* context) {
  auto optimizer = std::make_shared<OptimizerArguments>();
  client::Hyperparameters& params = optimizer->hyperparameters;
  CLI::App* command = app->add_subcommand("optimizer", "Show the optimizer, or configure it");
  command->group(kTrainingGroup);
  command->add_option("MODULE", optimizer->module)->required();
  CLI::Option* adamw = command->add_flag("--adamw", optimizer->adamw, "torch.optim.AdamW");
  CLI::Option* sgd = command->add_flag("--sgd", optimizer->sgd, "torch.optim.SGD");
  adamw->excludes(sgd);
  command->add_option("--lr", params.lr);
  command->add_option("--weight-decay", params.weight_decay);
  command->add_option("--maximize", params.maximize);
  command->add_option("--momentum", params.momentum, "SGD");
  command->add_option("--dampening", params.dampening, "SGD");
  command->add_option("--nesterov", params.nesterov, "SGD");
  command->add_option("--beta1", params.beta1, "AdamW");
  command->add_option("--beta2", params.beta2, "AdamW");
  command->add_option("--eps", params.eps, "AdamW");
  CLI::Option* groups = command->add_option(
      "--group", optimizer->groups,
      "A parameter group: NAME:GLOB,GLOB:lr=0.1,weight_decay=0; for each group one. They replace "
      "those that are; parameters in none have the optimizer's hyper-parameters");
  groups->allow_extra_args(false)->check(CLI::Validator(
      [](const std::string& text) {
        client::ParameterGroup group;
        return ParseGroup(text, &group);
      },
      "GROUP"));
  command->add_flag("--no-groups", optimizer->no_groups, "Drop the groups")->excludes(groups);
  command->add_option("--max-grad-norm", optimizer->max_grad_norm, "Clip gradients");
  command->add_option("--max-staleness", optimizer->max_staleness, "Refuse older pushes");
  command->add_flag("--reset-state", optimizer->reset_state, "Drop moments");
  command->callback([context, optimizer] { context->Finish(Optimizer(*context, *optimizer)); });
}

}  // namespace modelstate::cli
