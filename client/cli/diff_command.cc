#include <sys/stat.h>

#include <iostream>
#include <memory>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/files/compare.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

constexpr char kPin[] = "pin:";

bool LooksLikeFile(const std::string& text) {
  struct stat info;
  if (::stat(text.c_str(), &info) == 0 && !S_ISDIR(info.st_mode)) return true;
  if (absl::StartsWith(text, "/") || absl::StartsWith(text, ".")) return true;  // no module's name
  for (const char* extension : {".safetensors", ".pt", ".pth", ".bin"}) {
    if (absl::EndsWith(text, extension)) return true;
  }
  return false;
}

absl::StatusOr<std::unique_ptr<client::TensorSource>> Open(const Context& context,
                                                           const std::string& text) {
  if (LooksLikeFile(text)) return client::OpenFileSource(text);
  struct stat info;
  if (::stat(text.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) {
    auto folder = client::OpenFileSource(text);
    // One that holds no checkpoint just has the name of a module.
    if (GetReason(folder.status()) != Reason::kCheckpointNotFound) return folder;
  }
  const size_t at = text.find('@');
  const std::string module = text.substr(0, at);
  const std::string which = at == std::string::npos ? "" : text.substr(at + 1);
  uint64_t version = 0;
  std::string snapshot_id;
  if (absl::StartsWith(which, kPin)) {
    snapshot_id = which.substr(sizeof(kPin) - 1);
  } else if (at != std::string::npos && which != "current" &&
             (!absl::SimpleAtoi(which, &version) || version == 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", text, "\": write a version as MODULE@7, MODULE@pin:ID or MODULE@current"));
  }
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  return client::OpenModuleSource(client, module, version, snapshot_id, context.interrupt);
}

Json ComparisonJson(const client::TensorComparison& tensor) {
  Json json = {{"name", tensor.name}, {"equal", tensor.equal}, {"what", tensor.what}};
  if (tensor.compared) {
    json["elements"] = tensor.elements;
    json["different"] = tensor.different;
    json["max_abs_difference"] = tensor.max_abs_difference;
    if (tensor.max_integer_difference) json["max_abs_difference"] = *tensor.max_integer_difference;
    json["nonfinite"] = {tensor.nonfinite_a, tensor.nonfinite_b};
  }
  return json;
}

struct DiffArguments {
  std::string a;
  std::string b;
  bool all = false;
};

absl::Status Diff(Context* context, const DiffArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<client::TensorSource> a, Open(*context, arguments.a));
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<client::TensorSource> b, Open(*context, arguments.b));
  MS_ASSIGN_OR_RETURN(const client::Comparison comparison, client::CompareTensors(*a, *b));
  const uint64_t different = comparison.tensors.size() - comparison.equal;
  if (different > 0) context->exit_code = kDifferent;
  if (context->json) {
    Json differences = Json::array();
    Json tensors = Json::array();
    for (const client::TensorComparison& tensor : comparison.tensors) {
      if (arguments.all) tensors.push_back(ComparisonJson(tensor));
      if (!tensor.equal) differences.push_back(ComparisonJson(tensor));
    }
    Json json = {{"a", a->name()},
                 {"b", b->name()},
                 {"equal", comparison.equal},
                 {"differences", differences}};
    if (arguments.all) json["tensors"] = tensors;
    Context::Print(json);
    return absl::OkStatus();
  }
  for (const client::TensorComparison& tensor : comparison.tensors) {
    if (arguments.all || !tensor.equal)
      std::cout << Printable(tensor.name) << ": " << Printable(tensor.what) << "\n";
  }
  std::cout << Counted(comparison.equal, "tensor") << " equal, " << different << " different\n";
  return absl::OkStatus();
}

}  // namespace

void AddDiffCommand(CLI::App* app, Context* context) {
  auto diff = std::make_shared<DiffArguments>();
  CLI::App* command =
      app->add_subcommand("diff", "Compare files or versions of modules, tensor by tensor");
  command->footer(
      "A and B are each\n"
      "  FILE             as .safetensors, .pt, .pth or .bin; or a folder that holds a checkpoint\n"
      "  MODULE           its current version; MODULE@current, where a file has that name\n"
      "  MODULE@7         version 7: it is current, or a pin holds it\n"
      "  MODULE@pin:ID    what that pin holds\n"
      "Exits with 1 when they differ.");
  command->group(kTransferGroup);
  command->add_option("A", diff->a)->required();
  command->add_option("B", diff->b)->required();
  command->add_flag("--all", diff->all, "Show equal tensors too");
  command->callback([context, diff] { context->Finish(Diff(context, *diff)); });
}

}  // namespace modelstate::cli
