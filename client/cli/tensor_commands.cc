#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/digest.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct Options {
  std::string module;
  bool buffers = false;
  bool digests = false;
  Selection selection;
};

absl::Status List(const Context& context, const Options& options) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(
      const client::TensorList list,
      options.buffers ? client.ListBuffers(options.module, options.selection, options.digests)
                      : client.ListParameters(options.module, options.selection, options.digests));
  if (context.json) {
    Json tensors = Json::array();
    for (const client::TensorInfo& tensor : list.tensors) tensors.push_back(ToJson(tensor));
    Context::Print({{"version", ToJson(list.version)}, {"step", list.step}, {"tensors", tensors}});
    return absl::OkStatus();
  }
  std::vector<std::string> header = {
      "NAME",   "DTYPE", "SHAPE", "SIZE", options.buffers ? "PERSISTENT" : "REQUIRES_GRAD",
      "CHANGED"};
  if (options.digests) header.push_back("XXH3");
  Table table(header);
  uint64_t bytes = 0;
  for (const client::TensorInfo& tensor : list.tensors) {
    const bool flag = options.buffers ? tensor.spec.persistent : tensor.spec.requires_grad;
    std::vector<std::string> row = {
        tensor.spec.is_alias() ? absl::StrCat(tensor.spec.name, " = ", tensor.spec.alias_of)
                               : tensor.spec.name,
        std::string(DTypeName(tensor.spec.dtype)),
        tensor.spec.shape.ToString(),
        HumanBytes(tensor.spec.nbytes()),
        flag ? "yes" : "no",
        absl::StrCat(tensor.changed_version)};
    if (options.digests) row.push_back(tensor.xxh3 ? DigestToHex(*tensor.xxh3) : "-");
    if (!tensor.spec.is_alias()) bytes += tensor.spec.nbytes();
    table.Add(std::move(row));
  }
  table.Print();
  std::cout << list.tensors.size() << (options.buffers ? " buffers, " : " parameters, ")
            << HumanBytes(bytes) << ", version " << list.version.number << ", step " << list.step
            << "\n";
  return absl::OkStatus();
}

void AddList(CLI::App* app, Context* context, const char* name, const char* what, bool buffers) {
  auto options = std::make_shared<Options>();
  options->buffers = buffers;
  CLI::App* command = app->add_subcommand(name, what);
  command->add_option("MODULE", options->module)->required();
  command->add_flag("--digests", options->digests, "Show the XXH3 of each");
  command->add_option("--names", options->selection.names, "Only these");
  command->add_option("--prefix", options->selection.prefixes, "Only names that begin so");
  command->add_option("--glob", options->selection.globs, "Only names that match");
  command->callback([context, options] { context->Finish(List(*context, *options)); });
}

}  // namespace

void AddTensorCommands(CLI::App* app, Context* context) {
  AddList(app, context, "params", "List a module's parameters", false);
  AddList(app, context, "buffers", "List a module's buffers", true);
}

}  // namespace modelstate::cli
