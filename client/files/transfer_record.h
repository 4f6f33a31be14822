#ifndef MODELSTATE_CLIENT_FILES_TRANSFER_RECORD_H_
#define MODELSTATE_CLIENT_FILES_TRANSFER_RECORD_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/base/selection.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"

namespace modelstate::client {

// What a broken-off fetch to a file needs to go on.
struct TransferRecord {
  std::string module;
  std::string selection;    // SelectionKey
  std::string snapshot_id;  // empty: by version
  bool own_pin = true;      // made by the fetch, so that it may renew and release it
  Version version;
  std::string layout_digest;
  uint64_t header_bytes = 0;    // of the file, before its data region; 0: not known yet
  uint64_t total_bytes = 0;     // of the data region
  std::vector<ByteRange> done;  // of the data region: ascending, disjoint, not adjacent
};

// Equal for equal selections, with or without optimizer state.
std::string SelectionKey(const Selection& selection, bool optimizer_state = false);

// Adds a range to such a list, or takes one out.
void AddRange(const ByteRange& range, std::vector<ByteRange>* done);
void RemoveRange(const ByteRange& range, std::vector<ByteRange>* done);
// What of `part` is not in `done`.
std::vector<ByteRange> MissingRanges(const std::vector<ByteRange>& done, const ByteRange& part);

// A TransferRecord kept in a file: a line of JSON, then a line `BEGIN END` for each range that is
// done, added as it is. So whoever dies loses at most the line that it is writing, which a reader
// leaves out. Thread-compatible.
class TransferJournal {
 public:
  TransferJournal(std::string path, TransferRecord record)
      : path_(std::move(path)), record_(std::move(record)) {}

  // NOT_FOUND when there is none; DATA_LOSS CHECKPOINT_CORRUPT when it makes no sense.
  static absl::StatusOr<TransferRecord> Read(const std::string& path);

  const TransferRecord& record() const { return record_; }
  // Replaces the file in one step. STORAGE_ERROR, STORAGE_FULL.
  absl::Status Write(TransferRecord record);
  // One more range is done. REQUIRES: Write was called.
  absl::Status Add(const ByteRange& range);
  void Delete();

 private:
  absl::Status WriteAll();

  const std::string path_;
  TransferRecord record_;
  File file_;
  uint64_t size_ = 0;
  uint64_t added_bytes_ = 0;  // since WriteAll
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_TRANSFER_RECORD_H_
