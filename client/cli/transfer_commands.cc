#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "client/files/fetch_to_file.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

struct FetchArguments {
  std::string module;
  std::string out;
  std::string kind;
  bool optimizer_state = false;
  std::string float_dtype;
  client::FetchToFileOptions options;
};

absl::Status Fetch(const Context& context, FetchArguments arguments) {
  Selection& selection = arguments.options.selection;
  if (arguments.kind == "parameter") selection.kinds = {TensorKind::kParameter};
  if (arguments.kind == "buffer") selection.kinds = {TensorKind::kBuffer};
  if (arguments.kind == "optimizer-state") selection.kinds = {TensorKind::kOptimizerState};
  arguments.options.optimizer_state =
      arguments.optimizer_state || arguments.kind == "optimizer-state";
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
  if (!result->note.empty()) std::cout << Printable(result->note) << "\n";
  std::cout << "fetched version " << result->version.number << " (step " << result->step << ") of "
            << Printable(arguments.module) << " to " << Printable(arguments.out) << ": "
            << result->tensors << " tensors, " << HumanBytes(result->data_bytes)
            << absl::StrFormat(" in %.2f s", seconds)
            << (result->resumed
                    ? absl::StrCat(" (resumed: ", HumanBytes(result->received_bytes), " received)")
                    : "")
            << ", " << result->verified_digests << " of " << result->tensors_with_bytes
            << " digests verified\n";
  return absl::OkStatus();
}

struct PinArguments {
  std::string module;
  std::string lease = "60s";
  bool optimizer_state = false;
  std::string renew;
  std::string release;
};

absl::Status Pin(const Context& context, const PinArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  if (!arguments.release.empty()) {
    MS_RETURN_IF_ERROR(client.ReleaseSnapshot(arguments.release));
    if (context.json) {
      Context::Print({{"released", arguments.release}});
    } else {
      std::cout << "released " << Printable(arguments.release) << "\n";
    }
    return absl::OkStatus();
  }
  absl::Duration duration;
  absl::ParseDuration(arguments.lease, &duration);
  MS_ASSIGN_OR_RETURN(
      const client::SnapshotInfo pin,
      arguments.renew.empty()
          ? client.PinSnapshot(arguments.module, duration, arguments.optimizer_state)
          : client.RenewSnapshot(arguments.module, arguments.renew, duration));
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
              << ") of " << Printable(pin.module) << " until " << HumanTime(pin.expire_time)
              << "\n";
  }
  return absl::OkStatus();
}

}  // namespace

void AddTransferCommands(CLI::App* app, Context* context) {
  auto fetch = std::make_shared<FetchArguments>();
  CLI::App* command = app->add_subcommand("fetch", "Fetch a snapshot into a safetensors file");
  command->group(kTransferGroup);
  command->add_option("MODULE", fetch->module)->required();
  command->add_option("OUT", fetch->out, "The file to write")->required();
  command->add_option("--names", fetch->options.selection.names, "Only this tensor; repeatable")
      ->allow_extra_args(false);
  command
      ->add_option("--prefix", fetch->options.selection.prefixes,
                   "Only names that begin so; repeatable")
      ->allow_extra_args(false);
  command->add_option("--glob", fetch->options.selection.globs, "Only names that match; repeatable")
      ->allow_extra_args(false);
  command
      ->add_option("--kind", fetch->kind,
                   "Only parameters, only buffers, or only optimizer state (--optimizer-state need "
                   "not be said then)")
      ->check(CLI::IsMember({"parameter", "buffer", "optimizer-state"}));
  command->add_flag("--optimizer-state", fetch->optimizer_state,
                    "The optimizer state of the selected parameters too, each named SLOT/PARAMETER "
                    "as in exp_avg/fc.weight; of a --snapshot that was pinned with it");
  command->add_option("--float-dtype", fetch->float_dtype, "Cast floating-point tensors")
      ->check(CLI::IsMember({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}));
  CLI::Option* snapshot = command->add_option("--snapshot", fetch->options.snapshot_id,
                                              "The version that this pin holds, not the newest");
  command
      ->add_option("--version", fetch->options.version,
                   "This version: it is current, or a pin holds it")
      ->check(Positive())
      ->check(WholeNumber<uint64_t>())
      ->excludes(snapshot);
  command
      ->add_option("--parallel", fetch->options.streams,
                   "Over so many connections at once, for links that one does not fill")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command->add_flag("--resume", fetch->options.resume,
                    "Go on with what an interrupted fetch to OUT left");
  command->callback([context, fetch] { context->Finish(Fetch(*context, *fetch)); });

  auto pin = std::make_shared<PinArguments>();
  command = app->add_subcommand(
      "pin", "Hold the current version under a lease, renew the lease of a pin, or release it");
  command->group(kTransferGroup);
  CLI::Option* name = command->add_option("MODULE", pin->module);
  command->add_option("--lease", pin->lease, "How long from now, as 60s or 5m")
      ->capture_default_str()
      ->check(DurationText());
  CLI::Option* renew =
      command->add_option("--renew", pin->renew, "The id of a pin of MODULE: a new lease for it");
  renew->needs(name);
  command
      ->add_flag("--optimizer-state", pin->optimizer_state,
                 "Hold the optimizer state too, for fetch --optimizer-state")
      ->excludes(renew);
  command->add_option("--release", pin->release, "The id of a pin to end")
      ->excludes(name)
      ->excludes(renew);
  command->callback([context, pin] {
    if (pin->module.empty() && pin->release.empty()) {
      throw CLI::RequiredError("MODULE or --release ID");
    }
    context->Finish(Pin(*context, *pin));
  });
}

}  // namespace modelstate::cli
