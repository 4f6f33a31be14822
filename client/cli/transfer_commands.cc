#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/files/fetch_to_file.h"
#include "client/files/tensor_file.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct FetchArguments {
  std::string module;
  std::string out;
  std::string kind;
  std::string float_dtype;
  client::FetchToFileOptions options;
};

absl::Status Fetch(const Context& context, FetchArguments arguments) {
  Selection& selection = arguments.options.selection;
  if (arguments.kind == "parameter") selection.kinds = {TensorKind::kParameter};
  if (arguments.kind == "buffer") selection.kinds = {TensorKind::kBuffer};
  if (!arguments.float_dtype.empty()) selection.float_dtype = ParseDType(arguments.float_dtype);
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  ProgressBar bar(context);
  arguments.options.progress = bar.callback();
  const absl::Time start = absl::Now();
  absl::StatusOr<client::FetchToFileResult> result = client::FetchToFile(
      client, arguments.module, arguments.out, arguments.options, context.interrupt);
  bar.Clear();
  if (!result.ok()) return result.status();
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  if (context.json) {
    Json json = {{"module", arguments.module},
                 {"file", arguments.out},
                 {"version", ToJson(result->version)},
                 {"step", result->step},
                 {"tensors", result->tensors},
                 {"bytes", result->data_bytes},
                 {"file_bytes", result->file_bytes},
                 {"received_bytes", result->received_bytes},
                 {"seconds", seconds},
                 {"digests_verified", result->verified_digests},
                 {"digests", result->tensors_with_bytes},
                 {"resumed", result->resumed}};
    if (!result->note.empty()) json["note"] = result->note;
    Context::Print(json);
    return absl::OkStatus();
  }
  if (!result->note.empty()) std::cout << result->note << "\n";
  std::cout << "fetched version " << result->version.number << " (step " << result->step << ") of "
            << arguments.module << " to " << arguments.out << ": " << result->tensors
            << " tensors, " << HumanBytes(result->data_bytes)
            << absl::StrFormat(" in %.2f s", seconds)
            << (result->resumed
                    ? absl::StrCat(" (resumed: ", HumanBytes(result->received_bytes), " received)")
                    : "")
            << ", " << result->verified_digests << " of " << result->tensors_with_bytes
            << " digests verified\n";
  return absl::OkStatus();
}

absl::Status Pin(const Context& context, const std::string& module, const std::string& lease,
                 const std::string& release) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  if (!release.empty()) {
    MS_RETURN_IF_ERROR(client.ReleaseSnapshot(release));
    if (context.json) {
      Context::Print({{"released", release}});
    } else {
      std::cout << "released " << release << "\n";
    }
    return absl::OkStatus();
  }
  absl::Duration duration;
  absl::ParseDuration(lease, &duration);
  MS_ASSIGN_OR_RETURN(const client::SnapshotInfo pin, client.PinSnapshot(module, duration));
  if (context.json) {
    Context::Print({{"snapshot_id", pin.snapshot_id},
                    {"module", pin.module},
                    {"version", ToJson(pin.version)},
                    {"step", pin.step},
                    {"layout_digest", pin.layout_digest},
                    {"bytes", pin.total_bytes},
                    {"expire_time", absl::FormatTime(pin.expire_time, absl::UTCTimeZone())}});
  } else {
    std::cout << pin.snapshot_id << " holds version " << pin.version.number << " (step " << pin.step
              << ") of " << pin.module << " until " << HumanTime(pin.expire_time) << "\n";
  }
  return absl::OkStatus();
}

absl::Status Diff(Context* context, const std::string& a, const std::string& b) {
  MS_ASSIGN_OR_RETURN(const client::FileComparison comparison, client::CompareTensorFiles(a, b));
  if (!comparison.differences.empty()) context->exit_code = kDifferent;
  if (context->json) {
    Json differences = Json::array();
    for (const client::FileDifference& difference : comparison.differences) {
      differences.push_back({{"name", difference.name}, {"what", difference.what}});
    }
    Context::Print({{"equal", comparison.equal}, {"differences", differences}});
    return absl::OkStatus();
  }
  for (const client::FileDifference& difference : comparison.differences) {
    std::cout << difference.name << ": " << difference.what << "\n";
  }
  std::cout << comparison.equal << " tensors equal, " << comparison.differences.size()
            << " different\n";
  return absl::OkStatus();
}

}  // namespace

void AddTransferCommands(CLI::App* app, Context* context) {
  auto fetch = std::make_shared<FetchArguments>();
  CLI::App* command = app->add_subcommand("fetch", "Fetch a snapshot into a safetensors file");
  command->add_option("MODULE", fetch->module)->required();
  command->add_option("OUT", fetch->out, "The file to write")->required();
  command->add_option("--names", fetch->options.selection.names, "Only these tensors");
  command->add_option("--prefix", fetch->options.selection.prefixes, "Only names that begin so");
  command->add_option("--glob", fetch->options.selection.globs, "Only names that match");
  command->add_option("--kind", fetch->kind, "Only parameters or only buffers")
      ->check(CLI::IsMember({"parameter", "buffer"}));
  command->add_option("--float-dtype", fetch->float_dtype, "Cast floating-point tensors")
      ->check(CLI::IsMember({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}));
  command->add_flag("--resume", fetch->options.resume,
                    "Go on with what an interrupted fetch to OUT left");
  command->callback([context, fetch] { context->Finish(Fetch(*context, *fetch)); });

  auto module = std::make_shared<std::string>();
  auto lease = std::make_shared<std::string>("60s");
  auto release = std::make_shared<std::string>();
  command = app->add_subcommand("pin", "Hold the current version under a lease, or release it");
  CLI::Option* name = command->add_option("MODULE", *module);
  command->add_option("--lease", *lease, "How long, as 60s or 5m")
      ->check(CLI::Validator(
          [](const std::string& text) {
            absl::Duration duration;
            const bool valid =
                absl::ParseDuration(text, &duration) && duration > absl::ZeroDuration();
            return valid ? std::string() : "a duration is written as 60s or 5m";
          },
          "DURATION"));
  CLI::Option* id = command->add_option("--release", *release, "The id of a pin to end");
  name->excludes(id);
  command->callback([context, module, lease, release] {
    if (module->empty() && release->empty()) {
      throw CLI::RequiredError("MODULE or --release ID");
    }
    context->Finish(Pin(*context, *module, *lease, *release));
  });

  auto a = std::make_shared<std::string>();
  auto b = std::make_shared<std::string>();
  command = app->add_subcommand("diff", "Compare two local files bit by bit; 1 when they differ");
  command->add_option("A", *a)->required();
  command->add_option("B", *b)->required();
  command->callback([context, a, b] { context->Finish(Diff(context, *a, *b)); });
}

}  // namespace modelstate::cli
