#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "client/files/follow_file.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct FollowArguments {
  std::string module;
  std::string to;
  uint64_t versions = 0;
  client::FollowOptions options;
};

absl::Status Follow(const Context& context, const FollowArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  uint64_t written = 0;
  return client::FollowToFile(
      client, arguments.module, arguments.to, arguments.options,
      [&](const client::FollowedFile& file) {
        if (context.json) {
          // One document a line, as they come.
          std::cout << Json{{"file", file.path},
                            {"version", ToJson(file.version)},
                            {"step", file.step},
                            {"whole", file.update.whole},
                            {"changed", file.update.changed.size()},
                            {"tensors", file.tensors},
                            {"received_bytes", file.update.received_bytes},
                            {"file_bytes", file.file_bytes}}
                           .dump()
                    << std::endl;
        } else {
          std::cout << "version " << file.version.number << " (step " << file.step << ") in "
                    << Printable(file.path) << ": "
                    << (file.update.whole ? std::string("all")
                                          : absl::StrCat(file.update.changed.size(), " of"))
                    << " " << file.tensors << " tensors, " << HumanBytes(file.update.received_bytes)
                    << " received" << std::endl;
        }
        return ++written != arguments.versions;
      },
      context.interrupt);
}

}  // namespace

void AddFollowCommand(CLI::App* app, Context* context) {
  auto follow = std::make_shared<FollowArguments>();
  CLI::App* command = app->add_subcommand(
      "follow", "Keep a file current with a module: only what changes is fetched");
  command->group(kTransferGroup);
  command->add_option("MODULE", follow->module)->required();
  command
      ->add_option("--to", follow->to,
                   "The file to replace with each version, or a folder to write one for each into")
      ->required();
  Selection& selection = follow->options.selection;
  command->add_option("--names", selection.names, "Only this tensor; repeatable")
      ->allow_extra_args(false);
  command->add_option("--prefix", selection.prefixes, "Only names that begin so; repeatable")
      ->allow_extra_args(false);
  command->add_option("--glob", selection.globs, "Only names that match; repeatable")
      ->allow_extra_args(false);
  command->add_option("--versions", follow->versions, "End after so many; 0: never")
      ->check(WholeNumber<uint64_t>());
  command->callback([context, follow] { context->Finish(Follow(*context, *follow)); });
}

}  // namespace modelstate::cli
