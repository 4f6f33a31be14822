#ifndef MODELSTATE_CLIENT_FILES_TRANSFER_H_
#define MODELSTATE_CLIENT_FILES_TRANSFER_H_

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/client.h"
#include "client/files/fetch_to_file.h"
#include "client/files/transfer_record.h"
#include "client/range_fetch.h"
#include "common/base/file.h"
#include "common/base/state_layout.h"

namespace modelstate::client {

// The transfer of one held version into `path`.partial, over one connection or several at once, as
// often as they break; what is there is kept in `path`.partial.record. Internal to the folder.
//
// Every tensor is held against the server's digest in the end: by the trailer of the stream that
// brought all of it, else by asking for its digest alone. What is wrong by then (the file of a
// fetch that a power loss ended may have holes) is fetched once more.
//
// Thread-compatible; its own threads end with Run.
class Transfer {
 public:
  static std::string RecordPath(const std::string& path) { return path + ".partial.record"; }

  // `client` and `options` are borrowed. `record` says which version, and of a broken-off transfer
  // what is there.
  Transfer(const Client& client, const std::string& path, const FetchToFileOptions& options,
           TransferRecord record);

  // `keep`: goes on with the partial file, else begins it anew. INVALID_FIELD when another fetch
  // has it open.
  absl::Status Open(bool keep);
  // Until all bytes are here and right. Errors are those of FetchToFile.
  absl::Status Run(Cancellation* cancellation);
  // Puts the file in its place. REQUIRES: Run was OK.
  absl::StatusOr<FetchToFileResult> Commit();
  void Discard();

  TransferRecord record() const;

 private:
  class Stream;
  // A part of the region that one stream fetches; nullopt: all that is missing.
  using Unit = std::optional<ByteRange>;

  RangeRequest Request(const Unit& unit) const;
  // For a table where no stream will bring one.
  absl::Status ReadTable(Cancellation* cancellation);
  absl::Status FetchMissing(Cancellation* cancellation);
  void Divide();
  // `own`: over a connection of its own.
  void RunStreams(bool own, Cancellation* stop);
  absl::Status FetchUnit(const Client& client, const Unit& unit, Cancellation* stop);
  // Asks for the digests that no trailer has confirmed. Gives the tensors whose bytes are others.
  absl::StatusOr<std::vector<uint32_t>> Verify(Cancellation* cancellation);
  absl::Status HashTheRest(Cancellation* cancellation);
  absl::Status Forget(const std::vector<uint32_t>& tensors);
  absl::Status MismatchError(uint32_t tensor) const;

  // Of the streams.
  absl::Status OnHeader(const RangeHeader& header);
  absl::Status OnTable(std::vector<TensorSpec> specs, uint64_t* header_bytes);
  absl::Status OnChunk(uint64_t header_bytes, uint64_t offset, absl::Span<const uint8_t> bytes);
  void Merge(const RangeResult& result);

  absl::StatusOr<std::string> FileHeader(const std::vector<uint64_t>& digests) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Client& client_;
  const FetchToFileOptions& options_;
  const std::string path_;
  const std::string partial_;
  File file_;

  mutable absl::Mutex mutex_;
  TransferJournal journal_ ABSL_GUARDED_BY(mutex_);
  uint64_t step_ ABSL_GUARDED_BY(mutex_) = 0;
  bool has_table_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<TensorSpec> specs_ ABSL_GUARDED_BY(mutex_);
  std::vector<TensorSpec> named_ ABSL_GUARDED_BY(mutex_);  // the same as the file has them
  StateLayout layout_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::optional<uint64_t>> digests_ ABSL_GUARDED_BY(mutex_);
  std::vector<bool> verified_ ABSL_GUARDED_BY(mutex_);
  uint64_t received_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<Unit> units_ ABSL_GUARDED_BY(mutex_);
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_TRANSFER_H_
