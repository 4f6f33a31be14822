#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
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

void PrintModule(const client::ModuleInfo& module) {
  Table table = Table::OfPairs("module", module.name);
  table.Add({"state", StateName(module.state)});
  table.Add({"version", absl::StrCat(module.version.number, " of ", module.version.incarnation)});
  table.Add({"step", absl::StrCat(module.step)});
  table.Add({"parameters", absl::StrCat(module.parameter_count, " with ", module.parameter_elements,
                                        " elements")});
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
    Context::Print({{"version", info.version},
                    {"incarnation", absl::StrCat(info.incarnation)},
                    {"modules", info.module_count},
                    {"devices", devices},
                    {"max_message_bytes", info.max_message_bytes},
                    {"max_chunk_bytes", info.max_chunk_bytes},
                    {"push_memory_limit", info.push_memory_limit},
                    {"push_memory_used", info.push_memory_used},
                    {"snapshot_memory_limit", info.snapshot_memory_limit},
                    {"snapshot_memory_used", info.snapshot_memory_used},
                    {"max_lease_seconds", absl::ToDoubleSeconds(info.max_lease)},
                    {"checkpoint_formats", info.checkpoint_formats},
                    {"optimizers", info.optimizers},
                    {"start_time", absl::FormatTime(info.start_time, absl::UTCTimeZone())}});
    return absl::OkStatus();
  }
  Table table = Table::OfPairs("server", absl::StrCat(context.server, ", version ", info.version));
  table.Add({"started", HumanTime(info.start_time)});
  table.Add({"modules", absl::StrCat(info.module_count)});
  for (const client::DeviceInfo& device : info.devices) {
    table.Add({absl::StrCat("device ", device.name),
               absl::StrCat(HumanBytes(device.memory_used), " used and ",
                            HumanBytes(device.memory_pooled), " pooled of ",
                            HumanBytes(device.memory_limit))});
  }
  table.Add({"pushes", absl::StrCat(HumanBytes(info.push_memory_used), " of ",
                                    HumanBytes(info.push_memory_limit))});
  table.Add({"snapshots", absl::StrCat(HumanBytes(info.snapshot_memory_used), " of ",
                                       HumanBytes(info.snapshot_memory_limit))});
  table.Add({"longest lease", absl::FormatDuration(info.max_lease)});
  std::string formats;
  for (const std::string& format : info.checkpoint_formats) {
    absl::StrAppend(&formats, formats.empty() ? "" : ", ", format);
  }
  table.Add({"reads", formats});
  std::string optimizers;
  for (const std::string& optimizer : info.optimizers) {
    absl::StrAppend(&optimizers, optimizers.empty() ? "" : ", ", optimizer);
  }
  table.Add({"optimizers", optimizers});
  table.Print();
  return absl::OkStatus();
}

absl::Status Info(const Context& context, const std::string& name) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  if (name.empty()) return ShowServer(context, client);
  MS_ASSIGN_OR_RETURN(const client::ModuleInfo module, client.GetModule(name));
  if (context.json) {
    Context::Print(ToJson(module));
  } else {
    PrintModule(module);
  }
  return absl::OkStatus();
}

absl::Status Create(const Context& context, const std::string& name) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::ModuleInfo module, client.CreateModule(name));
  if (context.json) {
    Context::Print(ToJson(module));
  } else {
    std::cout << "created " << module.name << ", empty: load a checkpoint into it\n";
  }
  return absl::OkStatus();
}

absl::Status Remove(const Context& context, const std::string& name) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_RETURN_IF_ERROR(client.DeleteModule(name));
  if (context.json) {
    Context::Print({{"deleted", name}});
  } else {
    std::cout << "deleted " << name << "\n";
  }
  return absl::OkStatus();
}

absl::Status Watch(const Context& context, const std::string& name, uint64_t count) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  uint64_t seen = 0;
  Json events = Json::array();
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
  CLI::App* list = app->add_subcommand("ls", "List the modules");
  list->callback([context] { context->Finish(List(*context)); });

  auto name = std::make_shared<std::string>();
  CLI::App* info = app->add_subcommand("info", "Show a module, or the server when none is named");
  info->add_option("MODULE", *name);
  info->callback([context, name] { context->Finish(Info(*context, *name)); });

  CLI::App* create = app->add_subcommand("create", "Make an empty module for a load to fill");
  create->add_option("MODULE", *name)->required();
  create->callback([context, name] { context->Finish(Create(*context, *name)); });

  CLI::App* remove = app->add_subcommand("rm", "Delete a module");
  remove->add_option("MODULE", *name)->required();
  remove->callback([context, name] { context->Finish(Remove(*context, *name)); });

  auto count = std::make_shared<uint64_t>(0);
  CLI::App* watch = app->add_subcommand("watch", "Print each newer version until interrupted");
  watch->add_option("MODULE", *name)->required();
  watch->add_option("--count", *count, "Stop after this many; 0: never");
  watch->callback([context, name, count] { context->Finish(Watch(*context, *name, *count)); });
}

}  // namespace modelstate::cli
