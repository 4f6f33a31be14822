#include <iostream>
#include <memory>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

// What of a configuration was given; the rest stays as it is.
struct SetArguments {
  std::string module;
  std::string algorithm;
  Hyperparameters hyperparameters;
  std::vector<std::string> groups;
  bool no_groups = false;
  std::optional<bool> default_group, master_weights;
  std::optional<double> max_grad_norm, max_grad_value;
  bool no_clipping = false;
  std::optional<uint64_t> max_staleness;
  bool any_staleness = false;
  std::optional<uint32_t> quorum, min_contributions;
  std::optional<double> round_timeout;  // seconds
  bool reset_state = false;
};

bool ParseValue(const std::string& text, const HyperparameterField& field, Hyperparameters* h) {
  double number = 0;
  bool flag = false;
  if (field.number != nullptr) {
    if (!absl::SimpleAtod(text, &number)) return false;
    h->*field.number = number;
  } else {
    if (!absl::SimpleAtob(text, &flag)) return false;
    h->*field.flag = flag;
  }
  return true;
}

// NAME:GLOB[,GLOB...]:KEY=VALUE[,KEY=VALUE...]. An empty string, or what is wrong.
std::string ParseGroup(const std::string& text, ParameterGroup* group) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  if (parts.size() != 3) return "a group is written as NAME:GLOB,GLOB:lr=0.1,weight_decay=0";
  group->name = parts[0];
  group->selection.globs = absl::StrSplit(parts[1], ',', absl::SkipEmpty());
  if (group->selection.globs.empty()) return "a group needs a glob of its parameters";
  return ParseSettings(parts[2], &group->hyperparameters);
}

std::optional<Algorithm> AlgorithmNamed(const std::string& any_case) {
  return ParseAlgorithm(absl::AsciiStrToLower(any_case));
}

std::string UpperName(Algorithm algorithm) {
  return absl::AsciiStrToUpper(AlgorithmName(algorithm));
}

Json ToJson(const Hyperparameters& h) {
  Json json = Json::object();
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (!field.is_set(h)) continue;
    if (field.number != nullptr) {
      json[field.name] = *(h.*field.number);
    } else {
      json[field.name] = *(h.*field.flag);
    }
  }
  return json;
}

// The first few of them.
Json Names(uint64_t count, const std::vector<std::string>& first) {
  return {{"count", count}, {"first", first}};
}

std::string Text(uint64_t count, const std::vector<std::string>& first) {
  return absl::StrCat(Joined(first), count > first.size() ? ", ..." : "");
}

Json ToJson(const client::OptimizerInfo& info) {
  Json groups = Json::array();
  for (const client::ParameterGroupInfo& group : info.groups) {
    groups.push_back({{"name", group.name},
                      {"parameters", group.parameter_count},
                      {"hyperparameters", ToJson(group.hyperparameters)}});
  }
  const OptimizerConfig& config = info.config;
  Json json = {{"algorithm", UpperName(config.algorithm)},
               {"groups", groups},
               {"ungrouped", Names(info.ungrouped_count, info.ungrouped)},
               {"step", info.step},
               {"state_bytes", info.state_bytes},
               {"version", cli::ToJson(info.version)},
               {"master_weights", config.master_weights},
               {"dropped", Names(info.dropped_count, info.dropped)},
               {"workers", info.worker_count}};
  if (config.max_grad_norm) json["max_grad_norm"] = *config.max_grad_norm;
  if (config.max_grad_value) json["max_grad_value"] = *config.max_grad_value;
  if (config.max_staleness) json["max_staleness"] = *config.max_staleness;
  if (config.rounds.quorum > 1) {
    json["rounds"] = {{"quorum", config.rounds.quorum},
                      {"min_contributions", config.rounds.min_contributions},
                      {"round_timeout_seconds", absl::ToDoubleSeconds(config.rounds.round_timeout)},
                      {"memory_bytes", info.round_memory_bytes},
                      {"contributions", info.round ? info.round->contributions : 0},
                      {"workers", info.round ? info.round->workers : std::vector<std::string>()}};
  }
  return json;
}

void PrintGroups(const client::OptimizerInfo& info) {
  for (size_t i = 0; i < info.groups.size(); ++i) {
    const client::ParameterGroupInfo& group = info.groups[i];
    std::cout << "group " << i
              << (group.name.empty() ? "" : absl::StrCat(" \"", Printable(group.name), "\""))
              << ": " << Counted(group.parameter_count, "parameter");
    const Json hyperparameters = ToJson(group.hyperparameters);
    for (const auto& [name, value] : hyperparameters.items()) {
      std::cout << ", " << name << " " << value.dump();
    }
    std::cout << "\n";
  }
  if (info.ungrouped_count > 0) {
    std::cout << "in no group: " << Counted(info.ungrouped_count, "parameter") << ": "
              << Text(info.ungrouped_count, info.ungrouped) << "\n";
  }
}

void Print(const Context& context, const client::OptimizerInfo& info) {
  if (context.json) return Context::Print(ToJson(info));
  const OptimizerConfig& config = info.config;
  std::cout << UpperName(config.algorithm) << ", step " << info.step << ", "
            << HumanBytes(info.state_bytes) << " of state";
  if (config.max_grad_norm) std::cout << ", clipped to the norm " << *config.max_grad_norm;
  if (config.max_grad_value) std::cout << ", clipped to the value " << *config.max_grad_value;
  if (config.max_staleness) std::cout << ", at most " << *config.max_staleness << " steps stale";
  if (!config.master_weights) std::cout << ", without master weights";
  std::cout << "\n";
  PrintGroups(info);
  if (config.rounds.quorum > 1) {
    std::cout << "rounds of " << config.rounds.quorum << " workers";
    if (config.rounds.min_contributions > 0) {
      std::cout << ", or " << config.rounds.min_contributions << " after "
                << absl::FormatDuration(config.rounds.round_timeout);
    }
    std::cout << ", " << HumanBytes(info.round_memory_bytes) << " set aside";
    if (info.round) std::cout << "; open: " << Joined(info.round->workers);
    std::cout << "\n";
  }
  if (info.dropped_count > 0) {
    std::cout << "dropped " << Counted(info.dropped_count, "tensor")
              << " of state: " << Text(info.dropped_count, info.dropped) << "\n";
  }
}

absl::Status Show(const Context& context, const std::string& module) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::OptimizerInfo info, client.GetOptimizer(module));
  Print(context, info);
  return absl::OkStatus();
}

void Change(const SetArguments& arguments, OptimizerConfig* config) {
  config->hyperparameters =
      MergeHyperparameters(config->hyperparameters, arguments.hyperparameters);
  if (arguments.no_groups || !arguments.groups.empty()) config->groups.clear();
  for (const std::string& text : arguments.groups) {
    ParseGroup(text, &config->groups.emplace_back());  // checked as it was given
  }
  if (arguments.default_group) config->no_default_group = !*arguments.default_group;
  if (arguments.master_weights) config->master_weights = *arguments.master_weights;
  if (arguments.no_clipping || arguments.max_grad_norm || arguments.max_grad_value) {
    config->max_grad_norm = arguments.max_grad_norm;
    config->max_grad_value = arguments.max_grad_value;
  }
  if (arguments.max_staleness) config->max_staleness = arguments.max_staleness;
  if (arguments.any_staleness) config->max_staleness.reset();
  Rounds& rounds = config->rounds;
  if (arguments.quorum) rounds.quorum = *arguments.quorum;
  if (arguments.quorum == 1u) rounds = Rounds();  // without rounds there is nothing to time out
  if (arguments.min_contributions) rounds.min_contributions = *arguments.min_contributions;
  if (arguments.round_timeout) rounds.round_timeout = absl::Seconds(*arguments.round_timeout);
  // 0 of one says "no timeout", which leaves nothing of the other.
  if (arguments.min_contributions == 0u && !arguments.round_timeout) {
    rounds.round_timeout = absl::ZeroDuration();
  }
  if (arguments.round_timeout == 0.0 && !arguments.min_contributions) rounds.min_contributions = 0;
}

// A glob that is mistyped takes nothing, which the server does not mind.
void WarnOfEmptyGroups(const OptimizerConfig& config, const client::OptimizerInfo& info) {
  for (size_t i = 0; i < config.groups.size() && i < info.groups.size(); ++i) {
    if (info.groups[i].parameter_count > 0) continue;
    std::cerr << "modelstate: warning: group " << i << " "
              << Printable(QuotedList({config.groups[i].name}))
              << " has no parameter: none has a name of it, or earlier groups have them all\n";
  }
}

absl::Status Set(const Context& context, const SetArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  OptimizerConfig config;
  absl::StatusOr<client::OptimizerInfo> current = client.GetOptimizer(arguments.module);
  const bool configured = GetReason(current.status()) != Reason::kNoOptimizer;
  if (configured && !current.ok()) return current.status();
  // Without an algorithm the current configuration is changed in part; another algorithm begins
  // with its own hyper-parameters and no groups.
  if (configured) config = current->config;
  if (!arguments.algorithm.empty()) {
    const Algorithm algorithm = *AlgorithmNamed(arguments.algorithm);
    if (algorithm != config.algorithm) {
      config.hyperparameters = Hyperparameters();
      config.groups.clear();
      config.no_default_group = false;
    }
    config.algorithm = algorithm;
  } else if (!configured) {
    return current.status();
  }
  Change(arguments, &config);
  MS_ASSIGN_OR_RETURN(const client::OptimizerInfo info,
                      client.ConfigureOptimizer(arguments.module, config, arguments.reset_state));
  WarnOfEmptyGroups(config, info);
  Print(context, info);
  return absl::OkStatus();
}

absl::Status Groups(const Context& context, const std::string& module) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::OptimizerInfo info, client.GetOptimizer(module));
  client::ListOptions options;
  options.view = client::ListView::kNamed;  // a tied parameter once
  MS_ASSIGN_OR_RETURN(const client::TensorList list, client.ListParameters(module, options));
  Json parameters = Json::array();
  Table table({"PARAMETER", "GROUP", "NAME"});
  for (const client::TensorInfo& tensor : list.tensors) {
    // The two answers may be of two configurations.
    const bool known = tensor.group && *tensor.group < info.groups.size();
    const std::string name = known ? info.groups[*tensor.group].name : "";
    Json json = {{"name", tensor.spec.name}, {"group", nullptr}};
    if (tensor.group) json["group"] = *tensor.group;
    if (!name.empty()) json["group_name"] = name;
    parameters.push_back(std::move(json));
    table.Add({tensor.spec.name, tensor.group ? absl::StrCat(*tensor.group) : "none", name});
  }
  if (context.json) {
    Context::Print({{"version", cli::ToJson(list.version)}, {"parameters", parameters}});
  } else {
    table.Print();
  }
  return absl::OkStatus();
}

// --NAME and --no-NAME; the last of them counts.
CLI::Option* AddSwitch(CLI::App* command, const std::string& name, std::optional<bool>* value,
                       const std::string& what) {
  return command->add_flag_function(
      absl::StrCat("--", name, ",!--no-", name), [value](int64_t count) { *value = count > 0; },
      what);
}

void AddAlgorithms(CLI::App* command, std::string* chosen) {
  CLI::Option_group* algorithms = command->add_option_group("Algorithm");
  algorithms->require_option(0, 1);
  std::vector<std::string> names;
  for (Algorithm algorithm : AllAlgorithms()) {
    const std::string name = AlgorithmName(algorithm);
    names.push_back(name);
    algorithms->add_flag_callback(
        "--" + name, [chosen, name] { *chosen = name; }, "The same as --algorithm " + name);
  }
  algorithms
      ->add_option("--algorithm", *chosen,
                   "Needed the first time; another than before begins with its own defaults")
      ->check(CLI::IsMember(names, CLI::ignore_case));
}

void AddGroups(CLI::App* command, SetArguments* set) {
  CLI::Option* groups = command->add_option(
      "--group", set->groups,
      "A parameter group: NAME:GLOB,GLOB:lr=0.1,weight_decay=0; for each group one. They replace "
      "those that are");
  groups->allow_extra_args(false)->check(CLI::Validator(
      [](const std::string& text) {
        ParameterGroup group;
        return ParseGroup(text, &group);
      },
      "GROUP"));
  command->add_flag("--no-groups", set->no_groups, "Drop the groups")->excludes(groups);
  AddSwitch(command, "default-group", &set->default_group,
            "Whether parameters that no group takes form one, or are not stepped");
}

void AddRounds(CLI::App* command, SetArguments* set) {
  command
      ->add_option("--quorum", set->quorum,
                   "Workers that make a round; 1: each push steps, and the timeout goes too")
      ->check(WholeNumber<uint32_t>());
  command
      ->add_option("--min-contributions", set->min_contributions,
                   "Enough when --round-timeout is over; 0: no timeout")
      ->check(WholeNumber<uint32_t>());
  command
      ->add_option("--round-timeout", set->round_timeout,
                   "Seconds from the first contribution; 0: no timeout")
      ->check(SecondsOrNone());
}

void AddSet(CLI::App* optim, Context* context) {
  auto set = std::make_shared<SetArguments>();
  CLI::App* command = optim->add_subcommand(
      "set", "Configure the optimizer, or change what is given of it; state that fits is kept");
  command->add_option("MODULE", set->module)->required();
  AddAlgorithms(command, &set->algorithm);
  AddHyperparameterOptions(command, &set->hyperparameters);
  AddGroups(command, set.get());
  CLI::Option* norm = command->add_option("--max-grad-norm", set->max_grad_norm,
                                          "Clip by the norm of all gradients");
  CLI::Option* value =
      command->add_option("--max-grad-value", set->max_grad_value, "Clip each element");
  norm->excludes(value);
  command->add_flag("--no-clipping", set->no_clipping)->excludes(norm)->excludes(value);
  CLI::Option* staleness =
      command
          ->add_option("--max-staleness", set->max_staleness,
                       "How many steps a push's base may be behind before the push is refused")
          ->check(WholeNumber<uint64_t>());
  command->add_flag("--any-staleness", set->any_staleness)->excludes(staleness);
  AddSwitch(command, "master-weights", &set->master_weights,
            "F32 copies of narrower parameters; on unless set");
  AddRounds(command, set.get());
  command->add_flag("--reset-state", set->reset_state, "Drop all optimizer state");
  command->callback([context, set] { context->Finish(Set(*context, *set)); });
}

// A command that takes a module alone.
void AddShow(CLI::App* optim, Context* context, const char* name, const char* what,
             absl::Status (*show)(const Context&, const std::string&)) {
  auto module = std::make_shared<std::string>();
  CLI::App* command = optim->add_subcommand(name, what);
  command->add_option("MODULE", *module)->required();
  command->callback([context, module, show] { context->Finish(show(*context, *module)); });
}

}  // namespace

std::string ParseSettings(const std::string& text, Hyperparameters* h) {
  for (const std::string& setting :
       std::vector<std::string>(absl::StrSplit(text, ',', absl::SkipEmpty()))) {
    const std::vector<std::string> pair = absl::StrSplit(setting, absl::MaxSplits('=', 1));
    const HyperparameterField* field = FindHyperparameter(pair[0]);
    if (field == nullptr) return absl::StrCat("there is no hyper-parameter \"", pair[0], "\"");
    if (field->is_set(*h)) return absl::StrCat("\"", pair[0], "\" is given twice");
    if (pair.size() != 2 || !ParseValue(pair[1], *field, h)) {
      return absl::StrCat("\"", setting, "\" is not written as ", pair[0], "=VALUE");
    }
  }
  return "";
}

void AddHyperparameterOptions(CLI::App* command, Hyperparameters* h) {
  for (const HyperparameterField& field : HyperparameterFields()) {
    const std::string name = absl::StrReplaceAll(field.name, {{"_", "-"}});
    CLI::Option* added = field.number != nullptr
                             ? command->add_option("--" + name, h->*field.number)
                             : AddSwitch(command, name, &(h->*field.flag), "");
    added->group("Hyper-parameters");
  }
}

CLI::App* AddOptimizerCommands(CLI::App* app, Context* context) {
  CLI::App* optim = app->add_subcommand("optim", "The optimizer of a module");
  optim->group(kTrainingGroup)->require_subcommand(1);
  AddShow(optim, context, "show", "Show algorithm, groups, rounds and memory", Show);
  AddSet(optim, context);
  AddShow(optim, context, "groups", "List which group each parameter is in", Groups);
  return optim;
}

}  // namespace modelstate::cli
