#include "client/files/transfer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/backoff.h"
#include "client/files/lease_keeper.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"

namespace modelstate::client {
namespace {

// Of several streams. Each unit brings the table again, which is to be a twentieth of it at most.
constexpr uint64_t kMinUnitBytes = uint64_t{256} << 10;
constexpr uint64_t kUnitsPerStream = 8;
constexpr uint64_t kTablesPerUnit = 20;
// Whoever is killed loses a chunk of each stream, so several streams have smaller ones.
constexpr uint32_t kChunkBytes = uint32_t{1} << 20;  // as the server would choose
constexpr uint32_t kMinChunkBytes = uint32_t{256} << 10;
// A request for digests alone has a range for each tensor.
constexpr size_t kDigestsPerRequest = 10000;
constexpr absl::Duration kPollInterval = absl::Milliseconds(50);

// Takes a table, and drops the bytes.
class Scratch : public RangeSink {
 public:
  absl::Status OnHeader(const RangeHeader&) override { return absl::OkStatus(); }
  absl::Status OnTable(std::vector<TensorSpec>) override { return absl::OkStatus(); }
  absl::Span<uint8_t> Destination(uint64_t, uint64_t max) override {
    buffer_.resize(std::max<size_t>(buffer_.size(), max));
    return absl::MakeSpan(buffer_).subspan(0, max);
  }
  absl::Status OnChunkDone(uint64_t, uint64_t) override { return absl::OkStatus(); }

 private:
  std::vector<uint8_t> buffer_;
};

}  // namespace

// What one stream brings.
class Transfer::Stream final : public RangeSink {
 public:
  explicit Stream(Transfer* transfer) : transfer_(*transfer) {}

  absl::Status OnHeader(const RangeHeader& header) override { return transfer_.OnHeader(header); }
  absl::Status OnTable(std::vector<TensorSpec> specs) override {
    return transfer_.OnTable(std::move(specs), &header_bytes_);
  }
  absl::Span<uint8_t> Destination(uint64_t, uint64_t max) override {
    if (buffer_.size() < used_ + max) buffer_.resize(used_ + max);
    const absl::Span<uint8_t> to = absl::MakeSpan(buffer_).subspan(used_, max);
    used_ += max;
    return to;
  }
  absl::Status OnChunkDone(uint64_t offset, uint64_t length) override {
    used_ = 0;
    return transfer_.OnChunk(header_bytes_, offset,
                             absl::MakeConstSpan(buffer_).subspan(0, length));
  }

 private:
  Transfer& transfer_;
  uint64_t header_bytes_ = 0;
  std::vector<uint8_t> buffer_;  // the chunk that is arriving
  uint64_t used_ = 0;
};

Transfer::Transfer(const Client& client, const std::string& path, const FetchToFileOptions& options,
                   TransferRecord record)
    : client_(client),
      options_(options),
      path_(path),
      partial_(path + ".partial"),
      journal_(RecordPath(path), std::move(record)) {}

TransferRecord Transfer::record() const {
  absl::MutexLock lock(&mutex_);
  return journal_.record();
}

absl::Status Transfer::Open(bool keep) {
  const int fd = ::open(partial_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return ErrnoError(errno, absl::StrCat("create ", path_, ", at first as ", partial_));
  file_ = File(fd, partial_);
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("another fetch is writing to ", partial_,
                                  "; wait for it, or give another path"),
                     {{"field", "path"}});
  }
  absl::MutexLock lock(&mutex_);
  TransferRecord record = journal_.record();
  if (keep) {
    // Nothing is there that the file is too short for.
    MS_ASSIGN_OR_RETURN(const uint64_t size, file_.Size());
    const uint64_t data = size - std::min(size, record.header_bytes);
    RemoveRange({record.header_bytes == 0 ? 0 : data, UINT64_MAX}, &record.done);
  } else {
    MS_RETURN_IF_ERROR(file_.Truncate(0));
  }
  return journal_.Write(std::move(record));
}

absl::Status Transfer::Run(Cancellation* cancellation) {
  std::unique_ptr<LeaseKeeper> lease;
  if (const TransferRecord held = record(); held.own_pin) {
    lease = std::make_unique<LeaseKeeper>(client_, held.module, held.snapshot_id, options_.lease);
  }
  for (bool again = false;; again = true) {
    MS_RETURN_IF_ERROR(FetchMissing(cancellation));
    MS_ASSIGN_OR_RETURN(const std::vector<uint32_t> wrong, Verify(cancellation));
    if (wrong.empty()) return absl::OkStatus();
    if (again) return MismatchError(wrong.front());
    MS_RETURN_IF_ERROR(Forget(wrong));
  }
}

RangeRequest Transfer::Request(const Unit& unit) const {
  absl::MutexLock lock(&mutex_);
  const TransferRecord& record = journal_.record();
  RangeRequest request;
  request.module = record.module;
  request.selection = options_.selection;
  request.snapshot_id = record.snapshot_id;
  request.optimizer_state = options_.optimizer_state;
  if (record.snapshot_id.empty()) request.version = record.version.number;
  request.layout_digest = record.layout_digest;
  request.chunk_bytes = options_.chunk_bytes;
  if (request.chunk_bytes == 0 && options_.streams > 1) {
    request.chunk_bytes =
        std::max(kMinChunkBytes, kChunkBytes / static_cast<uint32_t>(options_.streams));
  }
  if (unit || !record.done.empty()) {
    request.ranges = MissingRanges(record.done, unit ? *unit : ByteRange{0, record.total_bytes});
  }
  return request;
}

absl::Status Transfer::ReadTable(Cancellation* cancellation) {
  Backoff backoff(client_.connection_options());
  while (true) {
    absl::StatusOr<StateTable> table = FetchTable(client_, Request(std::nullopt), cancellation);
    if (table.ok()) {
      MS_RETURN_IF_ERROR(OnHeader(table->header));
      uint64_t header_bytes = 0;
      return OnTable(std::move(table->specs), &header_bytes);
    }
    if (!backoff.WaitBeforeRetry(table.status(), cancellation)) return table.status();
  }
}

absl::Status Transfer::FetchMissing(Cancellation* cancellation) {
  bool needs_table = options_.streams > 1;
  {
    absl::MutexLock lock(&mutex_);
    const TransferRecord& record = journal_.record();
    const bool all_here = !record.layout_digest.empty() &&
                          MissingRanges(record.done, {0, record.total_bytes}).empty();
    needs_table = !has_table_ && (needs_table || all_here);
    if (all_here && has_table_) return absl::OkStatus();
  }
  if (needs_table) MS_RETURN_IF_ERROR(ReadTable(cancellation));
  Divide();
  if (options_.streams <= 1) {
    RunStreams(/*own=*/false, cancellation);
    absl::MutexLock lock(&mutex_);
    return std::exchange(failure_, absl::OkStatus());
  }
  // Ends all streams where one fails, or the caller's Cancellation ends.
  Cancellation stop;
  std::vector<std::thread> threads;
  absl::Mutex mutex;
  int running = options_.streams;
  for (int i = 0; i < options_.streams; ++i) {
    threads.emplace_back([this, &stop, &mutex, &running] {
      RunStreams(/*own=*/true, &stop);
      absl::MutexLock lock(&mutex);
      --running;
    });
  }
  const auto ended = [&running] { return running == 0; };
  while (!mutex.LockWhenWithTimeout(absl::Condition(&ended), kPollInterval)) {
    mutex.Unlock();
    if (cancellation != nullptr && cancellation->cancelled()) stop.Cancel();
  }
  mutex.Unlock();
  for (std::thread& thread : threads) thread.join();
  absl::MutexLock lock(&mutex_);
  return std::exchange(failure_, absl::OkStatus());
}

void Transfer::Divide() {
  absl::MutexLock lock(&mutex_);
  units_.clear();
  if (options_.streams <= 1) {
    units_.push_back(std::nullopt);
    return;
  }
  const TransferRecord& record = journal_.record();
  const uint64_t share =
      record.total_bytes / (static_cast<uint64_t>(options_.streams) * kUnitsPerStream);
  const uint64_t size = std::max({kMinUnitBytes, share, kTablesPerUnit * record.header_bytes});
  for (uint64_t begin = 0; begin < record.total_bytes;) {
    uint64_t end = begin + std::min(size, record.total_bytes - begin);
    // A tensor that a unit has nearly all of is not cut: the trailer then has its digest.
    if (end < record.total_bytes) {
      const ByteRange tensor = layout_.range(layout_.by_offset()[layout_.FindPosition(end)]);
      if (tensor.end - end <= size / 4) end = tensor.end;
    }
    if (!MissingRanges(record.done, {begin, end}).empty()) units_.push_back(ByteRange{begin, end});
    begin = end;
  }
}

void Transfer::RunStreams(bool own, Cancellation* stop) {
  std::optional<Client> connection;
  if (own) connection = client_.WithOwnConnection();
  while (true) {
    Unit unit;
    {
      absl::MutexLock lock(&mutex_);
      if (units_.empty() || !failure_.ok()) return;
      unit = units_.front();
      units_.pop_front();
    }
    absl::Status status = FetchUnit(connection ? *connection : client_, unit, stop);
    if (!status.ok() && connection && !stop->cancelled()) {
      // Of several addresses it may lead to another server than the one that holds the version.
      connection.reset();
      status = FetchUnit(client_, unit, stop);
    }
    if (status.ok()) continue;
    absl::MutexLock lock(&mutex_);
    // The first one is why; the others were ended for it.
    if (!failure_.ok()) return;
    failure_ = status;
    if (options_.streams > 1) stop->Cancel();
    return;
  }
}

absl::Status Transfer::FetchUnit(const Client& client, const Unit& unit, Cancellation* stop) {
  Backoff backoff(client.connection_options());
  while (true) {
    const RangeRequest request = Request(unit);
    const bool here = request.ranges.empty() && (unit || !record().done.empty());
    if (here) return absl::OkStatus();
    Stream stream(this);
    const RangeResult result = FetchRanges(client, request, &stream, stop);
    Merge(result);
    if (result.status.ok()) return absl::OkStatus();
    if (result.received_bytes > 0) backoff.Reset();
    // A stream that the server gave up because nothing was taken from it goes on where it was.
    const bool stalled = GetReason(result.status) == Reason::kStreamStalled;
    if (!(stalled || IsTransient(result.status)) || !backoff.Wait(result.status, stop)) {
      return result.status;
    }
  }
}

absl::StatusOr<std::vector<uint32_t>> Transfer::Verify(Cancellation* cancellation) {
  MS_RETURN_IF_ERROR(HashTheRest(cancellation));
  std::vector<uint32_t> rest;
  std::vector<ByteRange> firsts;  // their first bytes
  {
    absl::MutexLock lock(&mutex_);
    for (const uint32_t i : layout_.by_offset()) {
      const uint64_t begin = layout_.range(i).begin;
      if (specs_[i].nbytes() == 0) verified_[i] = true;
      if (verified_[i]) continue;
      rest.push_back(i);
      firsts.push_back({begin, begin + 1});
    }
  }
  std::vector<uint32_t> wrong;
  Backoff backoff(client_.connection_options());
  for (size_t begin = 0; begin < rest.size();) {
    const size_t count = std::min(kDigestsPerRequest, rest.size() - begin);
    RangeRequest request = Request(std::nullopt);
    request.ranges.assign(firsts.begin() + static_cast<int64_t>(begin),
                          firsts.begin() + static_cast<int64_t>(begin + count));
    Scratch scratch;
    const RangeResult result = FetchRanges(client_, request, &scratch, cancellation);
    if (!result.status.ok()) {
      if (backoff.WaitBeforeRetry(result.status, cancellation)) continue;
      return result.status;
    }
    absl::MutexLock lock(&mutex_);
    for (size_t k = begin; k < begin + count; ++k) {
      const uint32_t i = rest[k];
      // A tensor of one byte came whole.
      const std::optional<uint64_t> theirs =
          specs_[i].nbytes() == 1 && result.verified[i] ? result.digests[i] : result.stated[i];
      if (!theirs) continue;
      verified_[i] = *theirs == *digests_[i];
      if (!verified_[i]) wrong.push_back(i);
    }
    begin += count;
  }
  return wrong;
}

absl::Status Transfer::HashTheRest(Cancellation* cancellation) {
  absl::MutexLock lock(&mutex_);
  std::vector<uint8_t> buffer(size_t{1} << 20);
  for (const uint32_t i : layout_.by_offset()) {
    if (digests_[i]) continue;
    const ByteRange range = layout_.range(i);
    Xxh3Stream hash;
    for (uint64_t pos = range.begin; pos < range.end;) {
      if (cancellation != nullptr && cancellation->cancelled()) {
        return absl::CancelledError("the fetch was cancelled");
      }
      const uint64_t size = std::min<uint64_t>(buffer.size(), range.end - pos);
      const absl::Span<uint8_t> piece = absl::MakeSpan(buffer).subspan(0, size);
      MS_RETURN_IF_ERROR(file_.ReadAt(journal_.record().header_bytes + pos, piece));
      hash.Update(piece);
      pos += size;
    }
    digests_[i] = hash.Digest();
  }
  return absl::OkStatus();
}

absl::Status Transfer::Forget(const std::vector<uint32_t>& tensors) {
  absl::MutexLock lock(&mutex_);
  TransferRecord record = journal_.record();
  for (const uint32_t i : tensors) {
    RemoveRange(layout_.range(i), &record.done);
    digests_[i] = std::nullopt;
  }
  return journal_.Write(std::move(record));
}

absl::Status Transfer::MismatchError(uint32_t tensor) const {
  absl::MutexLock lock(&mutex_);
  return MakeError(Reason::kDigestMismatch,
                   absl::StrCat("tensor \"", named_[tensor].name, "\" in ", partial_, " has XXH3 ",
                                DigestToHex(*digests_[tensor]),
                                ", the server's is another, also after it was fetched again"),
                   {{"tensor", named_[tensor].name}});
}

absl::Status Transfer::OnHeader(const RangeHeader& header) {
  absl::MutexLock lock(&mutex_);
  TransferRecord record = journal_.record();
  if (record.version.incarnation != 0 && header.version.incarnation != record.version.incarnation) {
    return MakeError(
        Reason::kIncarnationChanged,
        absl::StrCat("version ", record.version.number, " of module \"", record.module,
                     "\" is now of another life of it (it was made anew, its server was started "
                     "again, or another server answers), whose bytes may be others; fetch again "
                     "without resuming"),
        {{"module", record.module}, {"incarnation", absl::StrCat(header.version.incarnation)}});
  }
  if (record.version.number != 0 && header.version.number != record.version.number) {
    return absl::InternalError("the server answered with another version than the pinned one");
  }
  step_ = header.step;
  if (!record.layout_digest.empty()) return absl::OkStatus();  // it was asked for
  record.version = header.version;
  record.total_bytes = header.total_bytes;
  record.layout_digest = header.layout_digest;
  return journal_.Write(std::move(record));
}

absl::Status Transfer::OnTable(std::vector<TensorSpec> specs, uint64_t* header_bytes) {
  absl::MutexLock lock(&mutex_);
  if (!has_table_) {
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
    MS_ASSIGN_OR_RETURN(const std::string header, FileHeader(std::vector<uint64_t>(specs_.size())));
    TransferRecord record = journal_.record();
    if (record.header_bytes != 0 && record.header_bytes != header.size()) {
      return MakeError(Reason::kLayoutMismatch,
                       "the partial file is of another layout; fetch without resuming");
    }
    record.header_bytes = header.size();
    MS_RETURN_IF_ERROR(file_.WriteAt(0, AsBytes(header)));
    MS_RETURN_IF_ERROR(journal_.Write(std::move(record)));
    has_table_ = true;
  }
  *header_bytes = journal_.record().header_bytes;
  return absl::OkStatus();
}

absl::Status Transfer::OnChunk(uint64_t header_bytes, uint64_t offset,
                               absl::Span<const uint8_t> bytes) {
  MS_RETURN_IF_ERROR(file_.WriteAt(header_bytes + offset, bytes));
  absl::MutexLock lock(&mutex_);
  MS_RETURN_IF_ERROR(journal_.Add({offset, offset + bytes.size()}));
  if (options_.progress) {
    uint64_t done = 0;
    for (const ByteRange& range : journal_.record().done) done += range.size();
    options_.progress({"fetch", done, journal_.record().total_bytes});
  }
  return absl::OkStatus();
}

void Transfer::Merge(const RangeResult& result) {
  absl::MutexLock lock(&mutex_);
  received_bytes_ += result.received_bytes;
  for (size_t i = 0; i < result.digests.size() && i < digests_.size(); ++i) {
    if (result.digests[i]) digests_[i] = result.digests[i];
    if (result.verified[i]) verified_[i] = true;
  }
}

absl::StatusOr<std::string> Transfer::FileHeader(const std::vector<uint64_t>& digests) const {
  const TransferRecord& record = journal_.record();
  return SafetensorsHeader(
      named_, layout_, StateDictMetadata(record.module, record.version, step_, named_, digests));
}

absl::StatusOr<FetchToFileResult> Transfer::Commit() {
  absl::MutexLock lock(&mutex_);
  const TransferRecord& record = journal_.record();
  std::vector<uint64_t> digests(specs_.size());
  FetchToFileResult result;
  for (size_t i = 0; i < specs_.size(); ++i) {
    digests[i] = digests_[i].value_or(0);
    if (!layout_.owns_bytes(i)) continue;
    ++result.tensors_with_bytes;
    if (verified_[i]) ++result.verified_digests;
  }
  MS_ASSIGN_OR_RETURN(const std::string header, FileHeader(digests));
  if (header.size() != record.header_bytes) {
    return absl::InternalError("the file's header changed its size");
  }
  MS_RETURN_IF_ERROR(file_.WriteAt(0, AsBytes(header)));
  result.file_bytes = record.header_bytes + record.total_bytes;
  MS_RETURN_IF_ERROR(file_.Truncate(result.file_bytes));
  MS_RETURN_IF_ERROR(file_.SyncData());
  if (std::rename(partial_.c_str(), path_.c_str()) != 0) {
    return ErrnoError(errno, absl::StrCat("rename ", partial_));
  }
  journal_.Delete();
  MS_RETURN_IF_ERROR(SyncFolderOf(path_));
  result.version = record.version;
  result.step = step_;
  result.tensors = specs_.size();
  result.data_bytes = record.total_bytes;
  result.received_bytes = received_bytes_;
  return result;
}

void Transfer::Discard() {
  absl::MutexLock lock(&mutex_);
  journal_.Delete();
  ::unlink(partial_.c_str());
}

}  // namespace modelstate::client
