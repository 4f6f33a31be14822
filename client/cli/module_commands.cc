#include <algorithm>
#include <iostream>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

absl::Status List(const Context& context) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const std::vector<client::ModuleInfo> modules, client.ListModules());
  if (context.json) {
    Json json = Json::array();
    for (const client::ModuleInfo& module : modules) json.push_back(ToJson(module));
    Context::Print({{"modules", json}});
    return absl::OkStatus();
  }
  Table table({"MODULE", "STATE", "VERSION", "STEP", "PARAMETERS", "BUFFERS", "SIZE", "DEVICE"});
  for (const client::ModuleInfo& module : modules) {
    table.Add({module.name, StateName(module.state), absl::StrCat(module.version.number),
               absl::StrCat(module.step), absl::StrCat(module.parameter_count),
               absl::StrCat(module.buffer_count), HumanBytes(module.total_bytes), module.device});
  }
  table.Print();
  return absl::OkStatus();
}

void PrintModule(const client::ModuleInfo& module, uint64_t tied_names) {
  Table table = Table::OfPairs("module", module.name);
  table.Add({"state", StateName(module.state)});
  table.Add({"version", absl::StrCat(module.version.number, " of ", module.version.incarnation)});
  table.Add({"step", absl::StrCat(module.step)});
  table.Add({"parameters", absl::StrCat(CountedParameters(module.parameter_count, tied_names),
                                        " with ", module.parameter_elements, " elements")});
  table.Add({"buffers", absl::StrCat(module.buffer_count)});
  table.Add({"state_dict", HumanBytes(module.total_bytes)});
  table.Add({"layout", module.layout_digest});
  table.Add({"device", module.device});
  table.Add({"optimizer", module.has_optimizer ? "yes" : "no"});
  table.Add({"created", HumanTime(module.create_time)});
  for (const auto& [key, value] : module.metadata) table.Add({key, value});
  table.Print();
}

absl::Status ShowServer(const Context& context, const Client& client) {
  MS_ASSIGN_OR_RETURN(const client::ServerInfo info, client.GetServerInfo());
  if (context.json) {
    Json devices = Json::array();
    for (const client::DeviceInfo& device : info.devices) {
      devices.push_back({{"name", device.name},
                         {"memory_limit", device.memory_limit},
                         {"memory_used", device.memory_used},
                         {"memory_pooled", device.memory_pooled}});
    }
    Json periodic;
    if (info.periodic_saves) {
      periodic = {{"saved", info.periodic_saves->saved},
                  {"failed", info.periodic_saves->failed},
                  {"last_error", info.periodic_saves->last_error}};
    }
    Context::Print(
        {{"version", info.version},
         {"periodic_saves", periodic},
         {"incarnation", absl::StrCat(info.incarnation)},
         {"modules", info.module_count},
         {"devices", devices},
         {"max_message_bytes", info.max_message_bytes},
         {"max_chunk_bytes", info.max_chunk_bytes},
         {"push_memory_limit", info.push_memory_limit},
         {"push_memory_used", info.push_memory_used},
         {"snapshot_memory_limit", info.snapshot_memory_limit},
         {"snapshot_memory_used", info.snapshot_memory_used},
         {"held_versions", info.held_versions},
         {"pins", info.pins},
         {"running_calls", info.running_calls},
         {"max_lease_seconds", absl::ToDoubleSeconds(info.max_lease)},
         {"stream_stall_timeout_seconds", absl::ToDoubleSeconds(info.stream_stall_timeout)},
         {"checkpoint_formats", info.checkpoint_formats},
         {"optimizers", info.optimizers},
         {"start_time", absl::FormatTime(info.start_time, absl::UTCTimeZone())}});
    return absl::OkStatus();
  }
  Table table = Table::OfPairs("server", absl::StrCat(context.server, ", version ", info.version));
  table.Add({"started", HumanTime(info.start_time)});
  table.Add({"modules", absl::StrCat(info.module_count)});
  table.Add({"running calls", absl::StrCat(info.running_calls)});
  table.Add(
      {"held versions", absl::StrCat(info.held_versions, " (", Counted(info.pins, "pin"), ")")});
  table.Add({"longest lease", absl::FormatDuration(info.max_lease)});
  table.Add({"stalled streams end after", absl::FormatDuration(info.stream_stall_timeout)});
  table.Add({"largest message", HumanBytes(info.max_message_bytes)});
  table.Add({"largest chunk", HumanBytes(info.max_chunk_bytes)});
  if (info.periodic_saves) {
    const client::PeriodicSaves& saves = *info.periodic_saves;
    table.Add({"periodic saves",
               absl::StrCat(saves.saved, ", ", saves.failed, " failed",
                            saves.failed > 0 ? ": " : "", Printable(saves.last_error))});
  }
  table.Add({"reads", Joined(info.checkpoint_formats)});
  table.Add({"optimizers", Joined(info.optimizers)});
  table.Print();
  std::cout << "\n";
  Table budgets({"MEMORY", "USED", "LIMIT", "FREE FOR REUSE"});
  for (const client::DeviceInfo& device : info.devices) {
    budgets.Add({absl::StrCat("device ", device.name), HumanBytes(device.memory_used),
                 HumanBytes(device.memory_limit), HumanBytes(device.memory_pooled)});
  }
  budgets.Add({"pushes and loads that arrive", HumanBytes(info.push_memory_used),
               HumanBytes(info.push_memory_limit), "-"});
  budgets.Add({"held versions", HumanBytes(info.snapshot_memory_used),
               HumanBytes(info.snapshot_memory_limit), "-"});
  budgets.Print();
  return absl::OkStatus();
}

absl::Status Info(const Context& context, const std::string& name) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  if (name.empty()) return ShowServer(context, client);
  MS_ASSIGN_OR_RETURN(const client::ModuleInfo module, client.GetModule(name));
  uint64_t tied_names = 0;
  if (module.state == client::ModuleState::kReady && module.parameter_count > 0) {
    client::ListOptions one;
    one.max_tensors = 1;
    MS_ASSIGN_OR_RETURN(const client::TensorList names, client.ListParameters(name, one));
    tied_names = names.total - std::min(names.total, module.parameter_count);
  }
  if (context.json) {
    Json json = ToJson(module);
    json["tied_names"] = tied_names;
    Context::Print(json);
  } else {
    PrintModule(module, tied_names);
  }
  return absl::OkStatus();
}

struct MoveArguments {
  std::string module;
  std::string device;
  std::string dtype;
};

absl::Status Move(const Context& context, const MoveArguments& arguments) {
  client::MoveOptions options;
  options.device = arguments.device;
  if (!arguments.dtype.empty()) options.dtype = ParseDType(absl::AsciiStrToUpper(arguments.dtype));
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::ModuleInfo before, client.GetModule(arguments.module));
  MS_ASSIGN_OR_RETURN(const client::ModuleInfo module,
                      client.MoveModule(arguments.module, options));
  if (context.json) {
    Context::Print(ToJson(module));
  } else if (module.version == before.version) {
    std::cout << Printable(module.name) << " is so already: version " << module.version.number
              << " on " << module.device << ", " << HumanBytes(module.total_bytes) << "\n";
  } else {
    std::cout << "moved " << Printable(module.name) << ": version " << module.version.number
              << " on " << module.device << ", " << HumanBytes(module.total_bytes) << "\n";
  }
  return absl::OkStatus();
}

// The server names the first so many tensors of a version.
constexpr size_t kTensorsShown = 10;

Json VersionJson(const client::VersionInfo& version) {
  return {{"version", ToJson(version.version)},
          {"mutation", version.mutation},
          {"time", absl::FormatTime(version.time, absl::UTCTimeZone())},
          {"step", version.step},
          {"schema_revision", version.schema_revision},
          {"changed_parameters", version.changed_parameters},
          {"changed_buffers", version.changed_buffers},
          {"changed_bytes", version.changed_bytes},
          {"tensors", version.tensors},
          {"detail", version.detail},
          {"held", version.held}};
}

absl::Status History(const Context& context, const std::string& name, uint64_t limit) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const std::vector<client::VersionInfo> versions,
                      client.ListVersions(name, limit));
  if (context.json) {
    Json json = Json::array();
    for (const client::VersionInfo& version : versions) json.push_back(VersionJson(version));
    Context::Print({{"versions", json}});
    return absl::OkStatus();
  }
  Table table(
      {"VERSION", "TIME", "WHAT", "STEP", "PARAMETERS", "BUFFERS", "CHANGED", "HELD", "DETAIL"});
  for (const client::VersionInfo& version : versions) {
    std::string detail = version.detail;
    if (version.mutation == "FREEZE" && !version.tensors.empty()) {
      absl::StrAppend(&detail, ": ", Joined(version.tensors));
      if (version.tensors.size() == kTensorsShown) detail += ", ...";
    }
    table.Add({absl::StrCat(version.version.number), HumanTime(version.time), version.mutation,
               absl::StrCat(version.step), absl::StrCat(version.changed_parameters),
               absl::StrCat(version.changed_buffers), HumanBytes(version.changed_bytes),
               version.held ? "yes" : "no", detail});
  }
  table.Print();
  return absl::OkStatus();
}

absl::Status Remove(const Context& context, const std::string& name) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_RETURN_IF_ERROR(client.DeleteModule(name));
  if (context.json) {
    Context::Print({{"deleted", name}});
  } else {
    std::cout << "deleted " << Printable(name) << "\n";
  }
  return absl::OkStatus();
}

absl::Status Watch(const Context& context, const std::string& name, uint64_t count) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  uint64_t seen = 0;
  const absl::Status status = client.Watch(
      name,
      [&](const client::WatchEvent& event) {
        if (context.json) {
          // A document per line: it is followed while it grows.
          Json json = {{"mutation", event.last_mutation}, {"module", ToJson(event.module)}};
          std::cout << json.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
        } else {
          std::cout << "version " << event.module.version.number << "  step " << event.module.step
                    << "  " << event.last_mutation << std::endl;
        }
        return count == 0 || ++seen < count;
      },
      context.interrupt);
  // Being interrupted is how a watch ends.
  return absl::IsCancelled(status) ? absl::OkStatus() : status;
}

}  // namespace

void AddModuleCommands(CLI::App* app, Context* context) {
  CLI::App* list = app->add_subcommand("ls", "List the modules")->group(kModulesGroup);
  list->callback([context] { context->Finish(List(*context)); });

  auto name = std::make_shared<std::string>();
  CLI::App* info = app->add_subcommand(
      "info", "Show a module; without a name the server, its budgets and their use");
  info->group(kModulesGroup);
  info->add_option("MODULE", *name);
  info->callback([context, name] { context->Finish(Info(*context, *name)); });

  auto limit = std::make_shared<uint64_t>(0);
  CLI::App* history =
      app->add_subcommand("history", "List the last versions: what changed in each, and why");
  history->group(kModulesGroup);
  history->add_option("MODULE", *name)->required();
  history->add_option("--limit", *limit, "At most so many; 0: all that the server remembers")
      ->check(WholeNumber<uint64_t>());
  history->callback([context, name, limit] { context->Finish(History(*context, *name, *limit)); });

  auto count = std::make_shared<uint64_t>(0);
  CLI::App* watch = app->add_subcommand("watch", "Print each newer version until interrupted");
  watch->group(kModulesGroup);
  watch->add_option("MODULE", *name)->required();
  watch->add_option("--count", *count, "Stop after this many; 0: never")
      ->check(WholeNumber<uint64_t>());
  watch->callback([context, name, count] { context->Finish(Watch(*context, *name, *count)); });

  auto move = std::make_shared<MoveArguments>();
  CLI::App* command =
      app->add_subcommand("move", "Move a module to another device, or cast it to another dtype");
  command->group(kModulesGroup);
  command->add_option("MODULE", move->module)->required();
  command->add_option("--device", move->device, "A device that `modelstate info` lists");
  command
      ->add_option("--dtype", move->dtype,
                   "Of the floating-point parameters and buffers; others keep theirs")
      ->check(CLI::IsMember({"bf16", "f16", "f32", "f64"}, CLI::ignore_case));
  command->callback([context, move] {
    if (move->device.empty() && move->dtype.empty()) {
      throw CLI::RequiredError("--device or --dtype");
    }
    context->Finish(Move(*context, *move));
  });

  CLI::App* remove = app->add_subcommand("rm", "Delete a module")->group(kModulesGroup);
  remove->add_option("MODULE", *name)->required();
  remove->callback([context, name] { context->Finish(Remove(*context, *name)); });
}

}  // namespace modelstate::cli
