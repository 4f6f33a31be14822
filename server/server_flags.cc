#include "server/server_flags.h"

#include <cstdlib>
#include <optional>
#include <set>

#include "absl/flags/flag.h"
#include "absl/flags/reflection.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "server/byte_size.h"

using modelstate::ByteSize;

ABSL_FLAG(std::string, listen, "localhost:50051",
          "HOST:PORT to listen on; port 0 picks a free one and prints it");
ABSL_FLAG(std::string, checkpoint_root, "./checkpoints",
          "directory that checkpoints are in; made when missing");
ABSL_FLAG(std::string, device, "auto",
          "where tensors live: cpu, cuda:N or auto (cuda:0 where there is one, else cpu); or "
          "several with commas, of which modules begin on the first. cpu:N (N from 1 on) is a "
          "further pool of host memory with a limit of its own, to keep modules within a bound and "
          "for tests: cpu,cpu:1");
ABSL_FLAG(ByteSize, device_memory_bytes, ByteSize{},
          "most memory of each device to use; 0: three quarters of it, shared by the pools of host "
          "memory");
ABSL_FLAG(ByteSize, push_memory_bytes, ByteSize{},
          "most memory for pushes and loads that are arriving; 0: half of device_memory_bytes");
ABSL_FLAG(ByteSize, snapshot_memory_bytes, ByteSize{},
          "most memory for versions that pins and streams hold; 0: half of device_memory_bytes");
ABSL_FLAG(ByteSize, cast_memory_bytes, ByteSize{},
          "most memory, beside that of the devices, for tensors that were cast for readers of a "
          "held version, so that they share them; 0: an eighth of device_memory_bytes");
ABSL_FLAG(ByteSize, staging_memory_bytes, ByteSize{},
          "most pinned memory of the host for transfers with each GPU; 0: a part of the host's "
          "memory, 128MiB to 4GiB");
ABSL_FLAG(ByteSize, max_message_bytes, ByteSize{uint64_t{4} << 20}, "largest message to take");
ABSL_FLAG(ByteSize, max_chunk_bytes, ByteSize{uint64_t{2} << 20}, "largest chunk to send or take");
ABSL_FLAG(int32_t, compute_threads, 0, "threads for optimizer steps; 0: one per hardware thread");
ABSL_FLAG(int32_t, io_threads, 4,
          "threads for checkpoints; a load reads with at most as many as compute threads, but two");
ABSL_FLAG(int32_t, network_threads, 0,
          "threads that receive and send; 0: one per four hardware threads, at least two");
ABSL_FLAG(
    std::string, transport_profile, "auto",
    "how sockets are set up: lan (loopback and local networks: fixed buffers, no pacing), wan "
    "(as the host does it), or auto: by the round trip that each connection began with");
ABSL_FLAG(
    std::string, restore, "none",
    "latest: at the start every module comes back from its newest checkpoint that loads; none");
ABSL_FLAG(std::string, save_every, "",
          "save each module by itself to MODULE/step-<8 digits>: every so many steps, 100steps, or "
          "after each interval with a change, 10m; empty: never");
ABSL_FLAG(
    uint64_t, keep_last, 0,
    "after a save to MODULE/step-<8 digits> delete those of the module there but the newest so "
    "many; 0: none is deleted. Checkpoints of other names always stay");
ABSL_FLAG(uint64_t, keep_every, 0,
          "with --keep_last: of each so many steps the first checkpoint stays too; 0: none does");
ABSL_FLAG(absl::Duration, max_lease, absl::Hours(1), "longest lease of a pinned snapshot");
ABSL_FLAG(int32_t, max_workers, 10000, "workers whose last push each module remembers");
ABSL_FLAG(absl::Duration, worker_expiry, absl::Hours(24),
          "a worker that is silent for so long is forgotten, and what it accumulated is dropped");
ABSL_FLAG(absl::Duration, stream_stall_timeout, absl::Seconds(60),
          "a stream whose peer takes or sends nothing for so long is cut off");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(30),
          "how long running calls may go on after SIGTERM");
ABSL_FLAG(std::string, log_level, "info", "trace, debug, info, warn, error or off");
ABSL_FLAG(std::string, log_format, "text", "text or json, on stderr");

namespace modelstate {
namespace {

constexpr const char* kFlagNames[] = {"listen",
                                      "checkpoint_root",
                                      "device",
                                      "device_memory_bytes",
                                      "push_memory_bytes",
                                      "snapshot_memory_bytes",
                                      "cast_memory_bytes",
                                      "staging_memory_bytes",
                                      "max_message_bytes",
                                      "max_chunk_bytes",
                                      "compute_threads",
                                      "io_threads",
                                      "network_threads",
                                      "transport_profile",
                                      "restore",
                                      "save_every",
                                      "keep_last",
                                      "keep_every",
                                      "max_lease",
                                      "max_workers",
                                      "worker_expiry",
                                      "stream_stall_timeout",
                                      "drain_timeout",
                                      "log_level",
                                      "log_format"};

std::string VariableName(absl::string_view flag) {
  return absl::StrCat("MODELSTATE_", absl::AsciiStrToUpper(flag));
}

absl::Status FlagError(absl::string_view source, absl::string_view text) {
  return MakeError(Reason::kInvalidField, absl::StrCat(source, ": ", text));
}

bool IsOurs(absl::string_view name) {
  for (const char* flag : kFlagNames) {
    if (name == flag) return true;
  }
  return false;
}

// `source` is what the value came with: "--listen" or "MODELSTATE_LISTEN".
absl::Status SetFlag(absl::string_view name, absl::string_view value, absl::string_view source) {
  absl::CommandLineFlag* flag = absl::FindCommandLineFlag(name);
  std::string error;
  if (flag->ParseFrom(value, &error)) return absl::OkStatus();
  return FlagError(source, absl::StrCat(error, " (", flag->Help(), ")"));
}

absl::Status ParseArguments(absl::Span<char* const> arguments, std::set<std::string>* given,
                            bool* help) {
  for (size_t i = 1; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      *help = true;
      continue;
    }
    absl::string_view name = argument;
    if (!absl::ConsumePrefix(&name, "--")) {
      return FlagError(argument, "is no flag; see --help");
    }
    const size_t equals = name.find('=');
    absl::string_view value;
    if (equals != absl::string_view::npos) {
      value = name.substr(equals + 1);
      name = name.substr(0, equals);
    }
    const std::string underscored = absl::StrReplaceAll(name, {{"-", "_"}});
    name = underscored;
    if (!IsOurs(name)) return FlagError(absl::StrCat("--", name), "is no flag; see --help");
    if (equals == absl::string_view::npos) {
      if (++i == arguments.size()) {
        return FlagError(argument, absl::StrCat("has no value; write ", argument, "=VALUE"));
      }
      value = arguments[i];
    }
    MS_RETURN_IF_ERROR(SetFlag(name, value, absl::StrCat("--", name)));
    given->insert(std::string(name));
  }
  return absl::OkStatus();
}

absl::StatusOr<size_t> Threads(int32_t value, int32_t minimum, absl::string_view flag) {
  if (value < minimum || value > 1024) {
    return FlagError(absl::StrCat("--", flag),
                     absl::StrCat(value, " is not in ", minimum, " to 1024"));
  }
  return static_cast<size_t>(value);
}

// "100steps", "10m" or "".
absl::StatusOr<SavePeriod> ParseSaveEvery(absl::string_view text) {
  SavePeriod period;
  if (text.empty()) return period;
  absl::string_view steps = text;
  const bool parsed = absl::ConsumeSuffix(&steps, "steps")
                          ? absl::SimpleAtoi(steps, &period.steps)
                          : absl::ParseDuration(text, &period.interval);
  if (parsed && (period.steps > 0 || period.interval >= absl::Seconds(1))) return period;
  return FlagError("--save_every", absl::StrCat("\"", text,
                                                "\" is neither like 100steps nor a "
                                                "duration of a second or more, like 10m"));
}

absl::Status CheckListen(absl::string_view listen) {
  const size_t colon = listen.rfind(':');
  uint32_t port = 0;
  if (absl::StartsWith(listen, "unix:")) return absl::OkStatus();
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port > 65535) {
    return FlagError("--listen",
                     absl::StrCat("\"", listen, "\" is not HOST:PORT with a port of 0 to 65535"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ServerFlags> ParseServerFlags(absl::Span<char* const> arguments) {
  ServerFlags flags;
  std::set<std::string> given;
  MS_RETURN_IF_ERROR(ParseArguments(arguments, &given, &flags.help));
  if (flags.help) return flags;
  for (const char* name : kFlagNames) {
    const std::string variable = VariableName(name);
    const char* value = std::getenv(variable.c_str());
    if (value == nullptr || given.count(name) != 0) continue;
    MS_RETURN_IF_ERROR(SetFlag(name, value, variable));
  }
  ServerOptions& options = flags.options;
  options.listen = absl::GetFlag(FLAGS_listen);
  MS_RETURN_IF_ERROR(CheckListen(options.listen));
  options.checkpoint_root = absl::GetFlag(FLAGS_checkpoint_root);
  options.device = absl::GetFlag(FLAGS_device);
  options.device_memory_bytes = absl::GetFlag(FLAGS_device_memory_bytes).bytes;
  options.push_memory_bytes = absl::GetFlag(FLAGS_push_memory_bytes).bytes;
  options.snapshot_memory_bytes = absl::GetFlag(FLAGS_snapshot_memory_bytes).bytes;
  options.cast_memory_bytes = absl::GetFlag(FLAGS_cast_memory_bytes).bytes;
  options.staging_memory_bytes = absl::GetFlag(FLAGS_staging_memory_bytes).bytes;
  options.max_message_bytes = absl::GetFlag(FLAGS_max_message_bytes).bytes;
  options.max_chunk_bytes = absl::GetFlag(FLAGS_max_chunk_bytes).bytes;
  MS_ASSIGN_OR_RETURN(options.compute_threads,
                      Threads(absl::GetFlag(FLAGS_compute_threads), 0, "compute_threads"));
  MS_ASSIGN_OR_RETURN(options.io_threads,
                      Threads(absl::GetFlag(FLAGS_io_threads), 1, "io_threads"));
  MS_ASSIGN_OR_RETURN(options.network_threads,
                      Threads(absl::GetFlag(FLAGS_network_threads), 0, "network_threads"));
  const std::string profile = absl::GetFlag(FLAGS_transport_profile);
  const std::optional<TransportProfile> parsed = ParseTransportProfile(profile);
  if (!parsed) {
    return FlagError("--transport_profile",
                     absl::StrCat("\"", profile, "\" is not auto, lan or wan"));
  }
  options.transport_profile = *parsed;
  const std::string restore = absl::GetFlag(FLAGS_restore);
  if (restore != "none" && restore != "latest") {
    return FlagError("--restore", absl::StrCat("\"", restore, "\" is not latest or none"));
  }
  options.restore_latest = restore == "latest";
  MS_ASSIGN_OR_RETURN(options.save_every, ParseSaveEvery(absl::GetFlag(FLAGS_save_every)));
  options.retention.keep_last = absl::GetFlag(FLAGS_keep_last);
  options.retention.keep_every = absl::GetFlag(FLAGS_keep_every);
  if (options.retention.keep_every > 0 && options.retention.keep_last == 0) {
    return FlagError("--keep_every", "says what stays beside --keep_last: set that too");
  }
  options.max_lease = absl::GetFlag(FLAGS_max_lease);
  const int32_t max_workers = absl::GetFlag(FLAGS_max_workers);
  options.max_workers = max_workers > 0 ? static_cast<size_t>(max_workers) : 0;  // refused there
  options.worker_expiry = absl::GetFlag(FLAGS_worker_expiry);
  options.stream_stall_timeout = absl::GetFlag(FLAGS_stream_stall_timeout);
  options.drain_timeout = absl::GetFlag(FLAGS_drain_timeout);

  flags.log_level = absl::GetFlag(FLAGS_log_level);
  const std::set<std::string> levels = {"trace", "debug", "info", "warn", "error", "off"};
  if (levels.count(flags.log_level) == 0) {
    return FlagError("--log_level", absl::StrCat("\"", flags.log_level,
                                                 "\" is not trace, debug, info, warn, error or "
                                                 "off"));
  }
  const std::string format = absl::GetFlag(FLAGS_log_format);
  if (format != "text" && format != "json") {
    return FlagError("--log_format", absl::StrCat("\"", format, "\" is not text or json"));
  }
  flags.log_json = format == "json";
  return flags;
}

std::string ServerFlagsHelp() {
  std::string help =
      "modelstate-server: the home of a model's weights while it trains and serves.\n\n"
      "usage: modelstate-server [--FLAG=VALUE]...\n"
      "Each flag may also be set as MODELSTATE_FLAG; the command line wins. Sizes are bytes, or\n"
      "have KiB, MiB or GiB; durations are like 90s, 10m or 1h.\n\n";
  for (const char* name : kFlagNames) {
    const absl::CommandLineFlag* flag = absl::FindCommandLineFlag(name);
    absl::StrAppend(&help, "  --", name, "=", flag->DefaultValue(), "\n      ", flag->Help(), "\n");
  }
  return help;
}

}  // namespace modelstate
