#ifndef MODELSTATE_CLIENT_FILES_TRANSFER_RECORD_H_
#define MODELSTATE_CLIENT_FILES_TRANSFER_RECORD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/selection.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"

namespace modelstate::client {

// What a broken-off fetch to a file needs to go on, kept beside the file as JSON.
struct TransferRecord {
  std::string module;
  std::string selection;    // SelectionKey
  std::string snapshot_id;  // empty: by version
  bool own_pin = true;      // made by the fetch, so that it may renew and release it
  Version version;
  std::string layout_digest;
  uint64_t header_bytes = 0;
  uint64_t total_bytes = 0;
  std::vector<ByteRange> done;  // of the data region: ascending, disjoint, not adjacent
};

// Equal for equal selections, with or without optimizer state.
std::string SelectionKey(const Selection& selection, bool optimizer_state = false);

// Adds a range to such a list.
void AddRange(const ByteRange& range, std::vector<ByteRange>* done);
// What of [0, total_bytes) is not in `done`.
std::vector<ByteRange> MissingRanges(const std::vector<ByteRange>& done, uint64_t total_bytes);

// Replaces the file at `path` in one step.
absl::Status WriteTransferRecord(const TransferRecord& record, const std::string& path);
// NOT_FOUND when there is none; DATA_LOSS CHECKPOINT_CORRUPT when it makes no sense.
absl::StatusOr<TransferRecord> ReadTransferRecord(const std::string& path);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_TRANSFER_RECORD_H_
