#ifndef MODELSTATE_CLIENT_RANGE_FETCH_H_
#define MODELSTATE_CLIENT_RANGE_FETCH_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/client.h"
#include "common/base/state_layout.h"

namespace modelstate::client {

struct RangeRequest {
  std::string module;
  Selection selection;
  std::string snapshot_id;
  bool optimizer_state = false;
  uint64_t version = 0;           // where there is no snapshot_id; 0: the newest
  std::vector<ByteRange> ranges;  // ascending and disjoint; empty: all
  std::string layout_digest;      // not empty: LAYOUT_MISMATCH when the layout is another
  uint32_t chunk_bytes = 0;
  bool digests = true;  // false: none are made or checked
};

struct RangeHeader {
  Version version;
  uint64_t step = 0;
  std::string layout_digest;
  uint64_t total_bytes = 0;
};

// Who takes the ranges. Called by the thread that calls FetchRanges.
class RangeSink {
 public:
  virtual ~RangeSink() = default;
  virtual absl::Status OnHeader(const RangeHeader& header) = 0;
  // The whole table, checked; its layout is StateLayout(specs).
  virtual absl::Status OnTable(std::vector<TensorSpec> specs) = 0;
  // Memory for the bytes from `offset` of the data region on: 1 to `max` bytes.
  virtual absl::Span<uint8_t> Destination(uint64_t offset, uint64_t max) = 0;
  virtual absl::Status OnChunkDone(uint64_t offset, uint64_t length) = 0;
};

struct RangeResult {
  absl::Status status;
  uint64_t received_bytes = 0;
  // Per tensor of the table: the XXH3 of what arrived, where all of it was part of this stream, and
  // whether the server's agreed.
  std::vector<std::optional<uint64_t>> digests;
  std::vector<bool> verified;
  // Per tensor: the XXH3 of all of it as the server says, where `ranges` take only a part of it.
  std::vector<std::optional<uint64_t>> stated;
};

// One attempt to fetch ranges of a snapshot. What arrived before a failure stays useful: the sink
// has it, in order. For callers that put the pieces together themselves.
RangeResult FetchRanges(const Client& client, const RangeRequest& request, RangeSink* sink,
                        Cancellation* cancellation);

struct StateTable {
  RangeHeader header;
  std::vector<TensorSpec> specs;
};

// One attempt to fetch header and table alone. The ranges of `request` are not looked at.
absl::StatusOr<StateTable> FetchTable(const Client& client, RangeRequest request,
                                      Cancellation* cancellation);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_RANGE_FETCH_H_
