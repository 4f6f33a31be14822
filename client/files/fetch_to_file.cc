#include "client/files/fetch_to_file.h"

#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/files/held_version.h"
#include "client/files/transfer.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

// `path`, or what it links to. What is there gives its place to the fetched file by a rename, so it
// must be a regular file: a device, a pipe or a folder is refused before anything is asked for.
absl::StatusOr<std::string> FileToReplace(const std::string& path) {
  std::error_code error;
  const std::filesystem::file_status there = std::filesystem::status(path, error);
  if (!std::filesystem::exists(there)) return path;
  if (!std::filesystem::is_regular_file(there)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(path, " is not a regular file: give the name of one, or of none"),
                     {{"field", "path"}});
  }
  const std::filesystem::path resolved = std::filesystem::canonical(path, error);
  return error ? path : resolved.string();
}

// The record to go on with, or nullopt and in `note` why there is none.
std::optional<TransferRecord> FindRecord(const Client& client, const std::string& module,
                                         const std::string& path, const FetchToFileOptions& options,
                                         std::string* note) {
  absl::StatusOr<TransferRecord> record = TransferJournal::Read(Transfer::RecordPath(path));
  if (!record.ok()) {
    *note = absl::StrCat("began anew: ", record.status().message());
    return std::nullopt;
  }
  if (record->module != module ||
      record->selection != SelectionKey(options.selection, options.optimizer_state)) {
    *note = "began anew: the partial file is of another module or selection";
    return std::nullopt;
  }
  std::error_code error;
  if (!std::filesystem::exists(path + ".partial", error)) {
    *note = "began anew: the partial file is gone";
    return std::nullopt;
  }
  const bool other_pin = !options.snapshot_id.empty() && record->snapshot_id != options.snapshot_id;
  if (other_pin || (options.version != 0 && record->version.number != options.version)) {
    *note = "began anew: the partial file is of another version";
    return std::nullopt;
  }
  if (!record->own_pin) return *std::move(record);
  absl::StatusOr<SnapshotInfo> pin =
      client.RenewSnapshot(module, record->snapshot_id, options.lease);
  if (!pin.ok() || pin->version != record->version) {
    *note = absl::StrCat("began anew: version ", record->version.number, " is no longer held");
    return std::nullopt;
  }
  return *std::move(record);
}

absl::Status LostError(const TransferRecord& record) {
  return MakeError(Reason::kSnapshotNotFound,
                   absl::StrCat("version ", record.version.number, " of module \"", record.module,
                                "\" is no longer held by the server that answers: it is another "
                                "server now, or was out of reach for longer than the lease; fetch "
                                "the newest version"),
                   {{"module", record.module},
                    {"version", absl::StrCat(record.version.number)},
                    {"snapshot_id", record.snapshot_id}});
}

}  // namespace

absl::StatusOr<FetchToFileResult> FetchToFile(const Client& client, const std::string& module,
                                              const std::string& given_path,
                                              const FetchToFileOptions& options,
                                              Cancellation* cancellation) {
  MS_ASSIGN_OR_RETURN(const std::string path, FileToReplace(given_path));
  std::string note;
  std::optional<TransferRecord> record;
  if (options.resume) record = FindRecord(client, module, path, options, &note);
  constexpr int kMaxRestarts = 3;
  for (int restarts = 0;; ++restarts) {
    const bool resumed = record.has_value();
    if (!resumed) {
      MS_ASSIGN_OR_RETURN(const HeldVersion held,
                          HoldVersion(client, module, options.version, options.snapshot_id,
                                      options.lease, options.optimizer_state));
      record.emplace();
      record->module = module;
      record->selection = SelectionKey(options.selection, options.optimizer_state);
      record->snapshot_id = held.snapshot_id;
      record->own_pin = held.own_pin;
      record->version = held.version;
    }
    Transfer transfer(client, path, options, *std::move(record));
    record.reset();
    if (absl::Status opened = transfer.Open(/*keep=*/resumed); !opened.ok()) {
      const TransferRecord held = transfer.record();
      if (held.own_pin && !resumed) (void)client.ReleaseSnapshot(held.snapshot_id);
      return opened;
    }
    absl::Status status = transfer.Run(cancellation);
    const TransferRecord held = transfer.record();
    // The lease has ended while the server was out of reach, or another server answers.
    const bool lost = GetReason(status) == Reason::kSnapshotNotFound;
    const bool any_version = options.snapshot_id.empty() && options.version == 0;
    if (lost && any_version && restarts < kMaxRestarts) {
      note = absl::StrCat("began anew: version ", held.version.number, " was no longer held");
      continue;
    }
    if (lost && held.own_pin) status = LostError(held);
    // Bytes that are wrong, or of no use to a resume, are not kept.
    const bool useless = absl::IsNotFound(status) || absl::IsInvalidArgument(status) ||
                         absl::IsDataLoss(status) || absl::IsFailedPrecondition(status);
    absl::StatusOr<FetchToFileResult> result =
        status.ok() ? transfer.Commit() : absl::StatusOr<FetchToFileResult>(status);
    if (useless || absl::IsDataLoss(result.status())) transfer.Discard();
    if ((result.ok() || useless) && held.own_pin) (void)client.ReleaseSnapshot(held.snapshot_id);
    if (!result.ok()) return result.status();
    result->resumed = resumed;
    result->note = note;
    return result;
  }
}

}  // namespace modelstate::client
