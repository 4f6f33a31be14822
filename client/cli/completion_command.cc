// Completion scripts, made from the tree of commands so that none is forgotten.
#include <iostream>
#include <memory>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

// Prints the names of modules; hidden, asked by the scripts.
constexpr char kNamesCommand[] = "__modules";

struct OptionWords {
  std::vector<std::string> words;  // "--lease"
  std::string help;                // its first line
  bool takes_value = false;
  std::vector<std::string> values;  // where there are few
};

struct CommandWords {
  std::string name;
  std::string help;
  std::vector<OptionWords> options;
  std::vector<std::string> positionals;
  std::vector<std::string> subcommands;
};

// "TEXT:{named,state_dict}" names its values.
std::vector<std::string> ValuesOf(const std::string& type_name) {
  const size_t open = type_name.find('{');
  const size_t close = type_name.find('}');
  if (open == std::string::npos || close == std::string::npos) return {};
  return absl::StrSplit(type_name.substr(open + 1, close - open - 1), ',');
}

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

std::vector<const CLI::App*> Below(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

void AddWords(const CLI::App& app, CommandWords* command) {
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_positional()) {
      command->positionals.push_back(option->get_name(true));
      if (option->get_lnames().empty() && option->get_snames().empty()) continue;
    }
    OptionWords words;
    for (const std::string& name : option->get_lnames()) words.words.push_back("--" + name);
    for (const std::string& name : option->get_snames()) words.words.push_back("-" + name);
    words.help = FirstLine(option->get_description());
    words.takes_value = option->get_items_expected_max() > 0;
    if (words.takes_value) words.values = ValuesOf(option->get_type_name());
    command->options.push_back(std::move(words));
  }
  for (const CLI::App* sub : Below(app)) {
    if (sub->get_name().empty()) {
      AddWords(*sub, command);  // a group of options that exclude each other
    } else if (!sub->get_group().empty()) {
      command->subcommands.push_back(sub->get_name());
    }
  }
}

CommandWords Describe(const CLI::App& app) {
  CommandWords command;
  command.name = app.get_name();
  command.help = FirstLine(app.get_description());
  AddWords(app, &command);
  return command;
}

// The program itself, and its commands; one of a command is "optim set".
struct Tree {
  CommandWords root;
  std::vector<CommandWords> commands;
};

Tree Describe(const CLI::App* app) {
  Tree tree;
  tree.root = Describe(*app);
  for (const CLI::App* sub : Below(*app)) {
    if (sub->get_group().empty()) continue;
    tree.commands.push_back(Describe(*sub));
    for (const CLI::App* nested : Below(*sub)) {
      if (nested->get_name().empty()) continue;
      tree.commands.push_back(Describe(*nested));
      tree.commands.back().name = absl::StrCat(sub->get_name(), " ", nested->get_name());
    }
  }
  return tree;
}

std::string WordsOf(const std::vector<OptionWords>& options) {
  std::vector<std::string> all;
  for (const OptionWords& option : options) {
    all.insert(all.end(), option.words.begin(), option.words.end());
  }
  return absl::StrJoin(all, " ");
}

bool TakesModule(const CommandWords& command) {
  return !command.positionals.empty() && command.positionals[0] == "MODULE";
}
// `diff` takes modules and files in any place.
bool TakesModuleOrFile(const CommandWords& command) {
  return !command.positionals.empty() && command.positionals[0] == "A";
}

// Words of bash that follow an option with a value, over all commands: what comes after is not a
// positional.
std::string OptionsWithValues(const Tree& tree) {
  std::set<std::string> words;
  const auto add = [&words](const CommandWords& command) {
    for (const OptionWords& option : command.options) {
      if (option.takes_value) words.insert(option.words.begin(), option.words.end());
    }
  };
  add(tree.root);
  for (const CommandWords& command : tree.commands) add(command);
  return absl::StrJoin(words, "|");
}

// Commands that have commands; a word that cannot be typed where there are none.
std::string Parents(const Tree& tree) {
  std::vector<std::string> names;
  for (const CommandWords& command : tree.commands) {
    if (!command.subcommands.empty()) names.push_back(command.name);
  }
  return names.empty() ? "' '" : absl::StrJoin(names, "|");
}

constexpr char kBash[] =
    R"BASH(# bash completion of modelstate: source <(modelstate completion bash)
_modelstate_modules() {
  local server=() i
  for ((i = 1; i < COMP_CWORD - 1; ++i)); do
    [ "${COMP_WORDS[i]}" = --server ] && server=(--server "${COMP_WORDS[i + 1]}")
  done
  "${COMP_WORDS[0]}" "${server[@]}" @NAMES@ 2>/dev/null
}
_modelstate() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  local command= place=0 i
  for ((i = 1; i < COMP_CWORD; ++i)); do
    case ${COMP_WORDS[i]} in
      @WITH_VALUES@) ((++i)) ;;
      -*) ;;
      *)
        case $command in
          '') command=${COMP_WORDS[i]} ;;
          @PARENTS@) command="$command ${COMP_WORDS[i]}" ;;
          *) ((++place)) ;;
        esac ;;
    esac
  done
  local words= values= modules= options=@ROOT_OPTIONS@
  case $command in
    '') words=@COMMANDS@ ;;
@CASES@  esac
  case $command:$previous in
@VALUES@    *) values=- ;;
  esac
  if [ "$values" != - ]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
    return
  fi
  case $previous in
    @WITH_VALUES@) COMPREPLY=(); compopt -o default 2>/dev/null; return ;;
  esac
  if [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$current"))
    return
  fi
  if [ "$modules" = any ] || { [ "$modules" = first ] && [ "$place" -eq 0 ]; }; then
    words="$words $(_modelstate_modules)"
  fi
  # After the module come files, as far as is known here.
  if [ "$modules" = any ] || [ "$place" -gt 0 ]; then compopt -o default 2>/dev/null; fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -F _modelstate modelstate
)BASH";

std::string Quoted(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

std::string Bash(const Tree& tree) {
  const std::string root_options = WordsOf(tree.root.options);
  std::string cases;
  std::string values;
  for (const CommandWords& command : tree.commands) {
    absl::StrAppend(&cases, "    ", Quoted(command.name), ") options=",
                    Quoted(absl::StrCat(WordsOf(command.options), " ", root_options)));
    if (TakesModule(command)) absl::StrAppend(&cases, " modules=first");
    if (TakesModuleOrFile(command)) absl::StrAppend(&cases, " modules=any");
    if (!command.subcommands.empty()) {
      absl::StrAppend(&cases, " words=", Quoted(absl::StrJoin(command.subcommands, " ")));
    }
    if (command.name == "completion") absl::StrAppend(&cases, " words='bash zsh fish'");
    absl::StrAppend(&cases, " ;;\n");
    for (const OptionWords& option : command.options) {
      if (option.values.empty()) continue;
      for (const std::string& word : option.words) {
        absl::StrAppend(&values, "    ", Quoted(command.name), ":", word,
                        ") values=", Quoted(absl::StrJoin(option.values, " ")), " ;;\n");
      }
    }
  }
  return absl::StrReplaceAll(kBash,
                             {{"@NAMES@", kNamesCommand},
                              {"@PARENTS@", Parents(tree)},
                              {"@WITH_VALUES@", OptionsWithValues(tree)},
                              {"@ROOT_OPTIONS@", Quoted(root_options)},
                              {"@COMMANDS@", Quoted(absl::StrJoin(tree.root.subcommands, " "))},
                              {"@CASES@", cases},
                              {"@VALUES@", values}});
}

// zsh runs bash's completion.
std::string Zsh(const Tree& tree) {
  return absl::StrCat(
      "# zsh completion of modelstate: source <(modelstate completion zsh)\n"
      "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
      "compopt() { :; }\n",
      Bash(tree));
}

std::string FishOption(const OptionWords& option) {
  std::string text;
  for (const std::string& word : option.words) {
    absl::StrAppend(&text, absl::StartsWith(word, "--") ? absl::StrCat(" -l ", word.substr(2))
                                                        : absl::StrCat(" -s ", word.substr(1)));
  }
  if (option.takes_value) text += " -r";
  if (!option.values.empty()) {
    absl::StrAppend(&text, " -f -a ", Quoted(absl::StrJoin(option.values, " ")));
  }
  if (!option.help.empty()) absl::StrAppend(&text, " -d ", Quoted(option.help));
  return text;
}

std::string Fish(const Tree& tree) {
  std::string text = "# fish completion of modelstate: modelstate completion fish | source\n";
  for (const OptionWords& option : tree.root.options) {
    absl::StrAppend(&text, "complete -c modelstate", FishOption(option), "\n");
  }
  for (const CommandWords& command : tree.commands) {
    const bool nested = absl::StrContains(command.name, ' ');
    if (!nested) {
      absl::StrAppend(&text, "complete -c modelstate -n __fish_use_subcommand -f -a ", command.name,
                      " -d ", Quoted(command.help), "\n");
    }
    const std::string here = absl::StrCat(
        "complete -c modelstate -n '__fish_seen_subcommand_from ",
        absl::StrReplaceAll(command.name, {{" ", "; and __fish_seen_subcommand_from "}}), "'");
    for (const OptionWords& option : command.options) {
      absl::StrAppend(&text, here, FishOption(option), "\n");
    }
    if (TakesModule(command) || TakesModuleOrFile(command)) {
      absl::StrAppend(&text, here, " -a '(modelstate ", kNamesCommand, " 2>/dev/null)'\n");
    }
    if (!command.subcommands.empty()) {
      absl::StrAppend(&text, here, " -a ", Quoted(absl::StrJoin(command.subcommands, " ")), "\n");
    }
  }
  absl::StrAppend(&text,
                  "complete -c modelstate -n '__fish_seen_subcommand_from completion' -f -a "
                  "'bash zsh fish'\n");
  return text;
}

// Nothing where no server answers soon: completing must not wait, nor complain.
void PrintNames(const Context& context) {
  client::ClientOptions options;
  options.connect_timeout = absl::Milliseconds(700);
  options.timeout = absl::Seconds(2);
  options.max_attempts = 1;
  const absl::StatusOr<Client> client = Client::Connect(context.server, options);
  if (!client.ok()) return;
  const absl::StatusOr<std::vector<client::ModuleInfo>> modules = client->ListModules();
  if (!modules.ok()) return;
  for (const client::ModuleInfo& module : *modules) std::cout << Printable(module.name) << "\n";
}

}  // namespace

void AddCompletionCommand(CLI::App* app, Context* context) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app->add_subcommand(
      "completion", "Print a script that completes commands, options and module names in a shell");
  command->group(kShellGroup);
  command->footer("As in: source <(modelstate completion bash)");
  command->add_option("SHELL", *shell)->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->callback([app, shell] {
    const Tree tree = Describe(app);
    std::cout << (*shell == "bash" ? Bash(tree) : *shell == "zsh" ? Zsh(tree) : Fish(tree));
  });

  CLI::App* names = app->add_subcommand(kNamesCommand)->group("");
  names->callback([context] { PrintNames(*context); });
}

}  // namespace modelstate::cli
