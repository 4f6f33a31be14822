#include "client/files/fetch_to_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/backoff.h"
#include "client/files/held_version.h"
#include "client/files/transfer_record.h"
#include "client/range_fetch.h"
#include "common/base/digest.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"

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

absl::Span<const uint8_t> AsBytes(const std::string& text) {
  return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

// The transfer of one pinned version into a partial file, over any number of streams.
class Transfer final : public RangeSink {
 public:
  Transfer(const Client& client, const std::string& path, const FetchToFileOptions& options,
           TransferRecord record)
      : client_(client),
        options_(options),
        partial_(path + ".partial"),
        record_path_(path + ".partial.json"),
        record_(std::move(record)) {}

  absl::Status Open(bool keep) {
    const int fd =
        ::open(partial_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (keep ? 0 : O_TRUNC), 0644);
    if (fd < 0) return ErrnoError(errno, absl::StrCat("open ", partial_));
    file_ = File(fd, partial_);
    renew_at_ = absl::Now() + options_.lease / 3;
    return WriteTransferRecord(record_, record_path_);
  }

  // Streams until nothing is missing.
  absl::Status Run(Cancellation* cancellation) {
    Backoff backoff(client_.connection_options());
    while (true) {
      RangeRequest request;
      request.module = record_.module;
      request.selection = options_.selection;
      request.snapshot_id = record_.snapshot_id;
      request.optimizer_state = options_.optimizer_state;
      if (record_.snapshot_id.empty()) request.version = record_.version.number;
      request.layout_digest = record_.layout_digest;
      request.chunk_bytes = options_.chunk_bytes;
      if (!record_.done.empty()) {
        request.ranges = MissingRanges(record_.done, record_.total_bytes);
        // All bytes are here but not the end of the stream, or not its table: ask for the last
        // byte.
        if (request.ranges.empty()) {
          request.ranges.push_back({record_.total_bytes - 1, record_.total_bytes});
        }
      }
      buffer_used_ = 0;
      RangeResult result = FetchRanges(client_, request, this, cancellation);
      received_bytes_ += result.received_bytes;
      Merge(result);
      if (result.status.ok()) return absl::OkStatus();
      MS_RETURN_IF_ERROR(WriteTransferRecord(record_, record_path_));
      if (result.received_bytes > 0) backoff.Reset();
      if (!backoff.WaitBeforeRetry(result.status, cancellation)) return result.status;
      Renew();
    }
  }

  // Checks what no stream has checked, completes the header and puts the file in its place.
  absl::StatusOr<FetchToFileResult> Commit(const std::string& path) {
    MS_RETURN_IF_ERROR(HashTheRest());
    MS_RETURN_IF_ERROR(VerifyTheRest());
    std::vector<uint64_t> digests(specs_.size());
    FetchToFileResult result;
    for (size_t i = 0; i < specs_.size(); ++i) {
      digests[i] = digests_[i].value_or(0);
      if (!layout_.owns_bytes(i)) continue;
      ++result.tensors_with_bytes;
      if (verified_[i]) ++result.verified_digests;
    }
    MS_ASSIGN_OR_RETURN(const std::string header, Header(digests));
    if (header.size() != record_.header_bytes) {
      return absl::InternalError("the file's header changed its size");
    }
    MS_RETURN_IF_ERROR(file_.WriteAt(0, AsBytes(header)));
    result.file_bytes = record_.header_bytes + record_.total_bytes;
    MS_RETURN_IF_ERROR(file_.Truncate(result.file_bytes));
    MS_RETURN_IF_ERROR(file_.SyncData());
    if (std::rename(partial_.c_str(), path.c_str()) != 0) {
      return ErrnoError(errno, absl::StrCat("rename ", partial_));
    }
    ::unlink(record_path_.c_str());
    MS_RETURN_IF_ERROR(SyncFolderOf(path));
    result.version = record_.version;
    result.step = step_;
    result.tensors = specs_.size();
    result.data_bytes = record_.total_bytes;
    result.received_bytes = received_bytes_;
    return result;
  }

  const TransferRecord& record() const { return record_; }

  void Discard() {
    ::unlink(record_path_.c_str());
    ::unlink(partial_.c_str());
  }

 private:
  absl::Status OnHeader(const RangeHeader& header) override {
    const bool other_life = record_.version.incarnation != 0 &&
                            header.version.incarnation != record_.version.incarnation;
    if (other_life ||
        (record_.version.number != 0 && header.version.number != record_.version.number)) {
      return absl::InternalError("the server answered with another version than the pinned one");
    }
    record_.version = header.version;
    step_ = header.step;
    record_.total_bytes = header.total_bytes;
    record_.layout_digest = header.layout_digest;
    return absl::OkStatus();
  }

  absl::Status OnTable(std::vector<TensorSpec> specs) override {
    if (!specs_.empty()) return absl::OkStatus();
    specs_ = std::move(specs);
    layout_ = StateLayout(specs_);  // by name and slot, unlike the names in the file
    named_ = specs_;
    for (TensorSpec& spec : named_) {
      if (spec.slot.empty()) continue;
      spec.name = absl::StrCat(std::exchange(spec.slot, ""), "/", spec.name);
    }
    digests_.resize(specs_.size());
    verified_.resize(specs_.size());
    // Digests have one length, so the real ones fit in their place later.
    MS_ASSIGN_OR_RETURN(const std::string header, Header(std::vector<uint64_t>(specs_.size())));
    if (record_.header_bytes != 0 && record_.header_bytes != header.size()) {
      return MakeError(Reason::kLayoutMismatch,
                       "the partial file is of another layout; fetch without resuming");
    }
    record_.header_bytes = header.size();
    return file_.WriteAt(0, AsBytes(header));
  }

  absl::Span<uint8_t> Destination(uint64_t, uint64_t max) override {
    if (buffer_.size() < buffer_used_ + max) buffer_.resize(buffer_used_ + max);
    const absl::Span<uint8_t> to = absl::MakeSpan(buffer_).subspan(buffer_used_, max);
    buffer_used_ += max;
    return to;
  }

  absl::Status OnChunkDone(uint64_t offset, uint64_t length) override {
    buffer_used_ = 0;
    MS_RETURN_IF_ERROR(file_.WriteAt(record_.header_bytes + offset,
                                     absl::MakeConstSpan(buffer_).subspan(0, length)));
    AddRange({offset, offset + length}, &record_.done);
    const absl::Time now = absl::Now();
    if (now >= record_at_) {
      record_at_ = now + absl::Seconds(1);
      MS_RETURN_IF_ERROR(WriteTransferRecord(record_, record_path_));
    }
    if (now >= renew_at_) {
      renew_at_ = now + options_.lease / 3;
      Renew();
    }
    if (options_.progress) {
      uint64_t done = 0;
      for (const ByteRange& range : record_.done) done += range.size();
      options_.progress({"fetch", done, record_.total_bytes});
    }
    return absl::OkStatus();
  }

  // A failure is not fatal: the stream itself holds the version too.
  void Renew() {
    if (!record_.own_pin) return;
    (void)client_.RenewSnapshot(record_.module, record_.snapshot_id, options_.lease);
  }

  void Merge(const RangeResult& result) {
    for (size_t i = 0; i < result.digests.size() && i < digests_.size(); ++i) {
      if (result.digests[i]) digests_[i] = result.digests[i];
      if (result.verified[i]) verified_[i] = true;
    }
  }

  absl::StatusOr<std::string> Header(const std::vector<uint64_t>& digests) const {
    return SafetensorsHeader(
        named_, layout_,
        StateDictMetadata(record_.module, record_.version, step_, named_, digests));
  }

  absl::Status HashTheRest() {
    std::vector<uint8_t> buffer(size_t{4} << 20);
    for (uint32_t i : layout_.by_offset()) {
      if (digests_[i]) continue;
      const ByteRange range = layout_.range(i);
      Xxh3Stream hash;
      for (uint64_t pos = range.begin; pos < range.end;) {
        const uint64_t size = std::min<uint64_t>(buffer.size(), range.end - pos);
        const absl::Span<uint8_t> piece = absl::MakeSpan(buffer).subspan(0, size);
        MS_RETURN_IF_ERROR(file_.ReadAt(record_.header_bytes + pos, piece));
        hash.Update(piece);
        pos += size;
      }
      digests_[i] = hash.Digest();
    }
    return absl::OkStatus();
  }

  // A tensor that came over several streams was in no trailer. The server's listings have its
  // digest, as long as it has not changed since the pinned version.
  absl::Status VerifyTheRest() {
    bool complete = !options_.selection.float_dtype.has_value();
    bool any = false;
    for (uint32_t i : layout_.by_offset()) any |= !verified_[i];
    if (!any || !complete) return absl::OkStatus();
    absl::flat_hash_map<std::pair<std::string, std::string>, uint64_t> confirmed;
    const ListOptions with_digests = {.digests = true};
    const auto add = [&](const absl::StatusOr<TensorList>& list) {
      if (!list.ok() || list->version.incarnation != record_.version.incarnation) return;
      for (const TensorInfo& tensor : list->tensors) {
        // Of optimizer state it is not told when it changed: only that of the same version counts.
        const bool same = tensor.slot.empty() ? tensor.changed_version <= record_.version.number
                                              : list->version.number == record_.version.number;
        if (tensor.xxh3 && same) {
          confirmed.emplace(std::make_pair(tensor.spec.name, tensor.slot), *tensor.xxh3);
        }
      }
    };
    add(client_.ListParameters(record_.module, with_digests));
    add(client_.ListBuffers(record_.module, with_digests));
    if (options_.optimizer_state) add(client_.ListOptimizerState(record_.module, with_digests));
    for (uint32_t i : layout_.by_offset()) {
      const auto it = confirmed.find(std::make_pair(specs_[i].name, specs_[i].slot));
      if (verified_[i] || it == confirmed.end()) continue;
      if (it->second != *digests_[i]) {
        return MakeError(Reason::kDigestMismatch,
                         absl::StrCat("tensor \"", named_[i].name, "\" in ", partial_, " has XXH3 ",
                                      DigestToHex(*digests_[i]), ", the server's is ",
                                      DigestToHex(it->second), "; fetch it again"),
                         {{"tensor", named_[i].name}});
      }
      verified_[i] = true;
    }
    return absl::OkStatus();
  }

  const Client& client_;
  const FetchToFileOptions& options_;
  const std::string partial_;
  const std::string record_path_;
  TransferRecord record_;
  File file_;
  uint64_t step_ = 0;
  std::vector<TensorSpec> specs_;
  std::vector<TensorSpec> named_;  // the same as the file has them
  StateLayout layout_;
  std::vector<std::optional<uint64_t>> digests_;
  std::vector<bool> verified_;
  std::vector<uint8_t> buffer_;  // of the chunk that is arriving
  uint64_t buffer_used_ = 0;
  uint64_t received_bytes_ = 0;
  absl::Time record_at_ = absl::InfinitePast();
  absl::Time renew_at_;
};

// The record to go on with, or nullopt and in `note` why there is none.
std::optional<TransferRecord> FindRecord(const Client& client, const std::string& module,
                                         const std::string& path, const FetchToFileOptions& options,
                                         std::string* note) {
  absl::StatusOr<TransferRecord> record = ReadTransferRecord(path + ".partial.json");
  if (!record.ok()) {
    *note = absl::StrCat("began anew: ", record.status().message());
    return std::nullopt;
  }
  if (record->module != module ||
      record->selection != SelectionKey(options.selection, options.optimizer_state)) {
    *note = "began anew: the partial file is of another module or selection";
    return std::nullopt;
  }
  if (::access((path + ".partial").c_str(), F_OK) != 0) {
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
      if (transfer.record().own_pin) (void)client.ReleaseSnapshot(transfer.record().snapshot_id);
      return opened;
    }
    absl::Status status = transfer.Run(cancellation);
    const bool any_version = options.snapshot_id.empty() && options.version == 0;
    if (GetReason(status) == Reason::kSnapshotNotFound && any_version && restarts < kMaxRestarts) {
      note = absl::StrCat("began anew: version ", transfer.record().version.number,
                          " was no longer held");
      continue;
    }
    // Bytes that are wrong, or of no use to a resume, are not kept.
    const bool useless = absl::IsNotFound(status) || absl::IsInvalidArgument(status) ||
                         absl::IsDataLoss(status) || absl::IsFailedPrecondition(status);
    absl::StatusOr<FetchToFileResult> result =
        status.ok() ? transfer.Commit(path) : absl::StatusOr<FetchToFileResult>(status);
    if (useless || absl::IsDataLoss(result.status())) transfer.Discard();
    if ((result.ok() || useless) && transfer.record().own_pin) {
      (void)client.ReleaseSnapshot(transfer.record().snapshot_id);
    }
    if (!result.ok()) return result.status();
    result->resumed = resumed;
    result->note = note;
    return result;
  }
}

}  // namespace modelstate::client
