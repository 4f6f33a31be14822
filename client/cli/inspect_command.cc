#include <iostream>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/format/open_path.h"

namespace modelstate::cli {
namespace {

// Of metadata, whose values may be long lists.
constexpr size_t kShownValueBytes = 100;

struct InspectArguments {
  std::string path;
  std::string state_dict_key;
};

std::string KindText(const StoredTensor& tensor) {
  if (!tensor.kind) return "-";
  if (*tensor.kind == TensorKind::kParameter && !tensor.requires_grad.value_or(true)) {
    return "frozen parameter";
  }
  return TensorKindName(*tensor.kind);
}

Json TensorJson(const StoredTensor& tensor) {
  Json json = {{"name", tensor.name},
               {"dtype", std::string(tensor.dtype_name())},
               {"shape", Json::array()},
               {"bytes", tensor.nbytes()}};
  for (int64_t dim : tensor.shape.dims()) json["shape"].push_back(dim);
  if (tensor.kind) json["kind"] = TensorKindName(*tensor.kind);
  if (tensor.requires_grad) json["requires_grad"] = *tensor.requires_grad;
  if (!tensor.alias_of.empty()) json["alias_of"] = tensor.alias_of;
  if (tensor.xxh3) json["xxh3"] = DigestToHex(*tensor.xxh3);
  return json;
}

absl::Status Inspect(const Context& context, const InspectArguments& arguments) {
  MS_ASSIGN_OR_RETURN(
      const std::unique_ptr<CheckpointReader> reader,
      OpenCheckpointPath(arguments.path, arguments.state_dict_key, /*allow_opaque=*/true));
  uint64_t bytes = 0;
  uint64_t tied_names = 0;
  for (const StoredTensor& tensor : reader->tensors()) {
    if (tensor.alias_of.empty()) {
      bytes += tensor.nbytes();
    } else {
      ++tied_names;
    }
  }
  const char* format = CheckpointFormatName(reader->format());
  if (context.json) {
    Json json = {{"path", arguments.path}, {"format", format}, {"bytes", bytes}};
    json["tensors"] = Json::array();
    for (const StoredTensor& tensor : reader->tensors()) {
      json["tensors"].push_back(TensorJson(tensor));
    }
    json["metadata"] = reader->metadata();
    json["module_versions"] = reader->module_versions();
    Context::Print(json);
    return absl::OkStatus();
  }
  Table table({"NAME", "DTYPE", "SHAPE", "BYTES", "KIND", "TIED TO"});
  for (const StoredTensor& tensor : reader->tensors()) {
    table.Add({tensor.name, std::string(tensor.dtype_name()), tensor.shape.ToString(),
               absl::StrCat(tensor.nbytes()), KindText(tensor), tensor.alias_of});
  }
  table.Print();
  if (!reader->metadata().empty()) {
    Table metadata = Table::OfPairs("METADATA", "");
    for (const auto& [key, value] : reader->metadata()) {
      metadata.Add({key, value.size() <= kShownValueBytes
                             ? value
                             : absl::StrCat(value.substr(0, kShownValueBytes), "... (",
                                            value.size(), " bytes)")});
    }
    metadata.Print();
  }
  std::cout << Printable(arguments.path) << ": " << format << ", "
            << Counted(reader->tensors().size(), "tensor") << " (" << HumanBytes(bytes) << ")";
  if (tied_names > 0) std::cout << ", " << Counted(tied_names, "tied name") << " among them";
  if (!reader->module_versions().empty()) {
    std::cout << ", versions of " << Counted(reader->module_versions().size(), "module");
  }
  std::cout << "\n";
  return absl::OkStatus();
}

}  // namespace

void AddInspectCommand(CLI::App* app, Context* context) {
  auto inspect = std::make_shared<InspectArguments>();
  CLI::App* command = app->add_subcommand(
      "inspect", "Show what is in a checkpoint file, without a server and without its elements");
  command->group(kTransferGroup);
  command->add_option("FILE", inspect->path, "Or an index, or a folder that holds one")->required();
  command->add_option("--state-dict-key", inspect->state_dict_key,
                      "Where in a nested PyTorch file the state_dict is, as ema.model");
  command->callback([context, inspect] { context->Finish(Inspect(*context, *inspect)); });
}

}  // namespace modelstate::cli
