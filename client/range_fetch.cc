#include "client/range_fetch.h"

#include <utility>

#include "client/fetch.h"
#include "common/base/status.h"
#include "common/wire/convert.h"

namespace modelstate::client {
namespace {

class Adapter final : public TensorDestination {
 public:
  explicit Adapter(RangeSink* sink) : sink_(sink) {}

  absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) override {
    std::vector<TensorSpec> specs;
    specs.reserve(tensors.size());
    for (const ReceivedTensor& tensor : tensors) {
      if (tensor.values) {
        return absl::InternalError("the server sent elements in the table of a state_dict");
      }
      specs.push_back(tensor.spec);
      offsets_.push_back(tensor.offset);
    }
    return sink_->OnTable(std::move(specs));
  }
  absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) override {
    return sink_->Destination(offsets_[index] + offset, max);
  }
  absl::Status OnChunkDone(uint64_t offset, uint64_t length) override {
    return sink_->OnChunkDone(offset, length);
  }

 private:
  RangeSink* const sink_;
  std::vector<uint64_t> offsets_;
};

// Takes header and table of a stream and ends it.
class TableSink final : public RangeSink {
 public:
  absl::Status OnHeader(const RangeHeader& header) override {
    table_.header = header;
    return absl::OkStatus();
  }
  absl::Status OnTable(std::vector<TensorSpec> specs) override {
    table_.specs = std::move(specs);
    has_table_ = true;
    return absl::CancelledError("the table is all that is wanted");
  }
  absl::Span<uint8_t> Destination(uint64_t, uint64_t) override { return {}; }
  absl::Status OnChunkDone(uint64_t, uint64_t) override { return absl::OkStatus(); }

  bool has_table() const { return has_table_; }
  StateTable& table() { return table_; }

 private:
  StateTable table_;
  bool has_table_ = false;
};

}  // namespace

RangeResult FetchRanges(const Client& client, const RangeRequest& request, RangeSink* sink,
                        Cancellation* cancellation) {
  v1::StreamStateDictRequest proto;
  proto.set_module(request.module);
  SelectionToProto(request.selection, proto.mutable_selection());
  if (request.version != 0) proto.set_version(request.version);
  if (!request.snapshot_id.empty()) proto.set_snapshot_id(request.snapshot_id);
  for (const ByteRange& range : request.ranges) ByteRangeToProto(range, proto.add_ranges());
  proto.set_layout_digest(request.layout_digest);
  proto.set_optimizer_state(request.optimizer_state);
  proto.set_chunk_bytes(request.chunk_bytes);
  proto.set_skip_digests(!request.digests);

  Adapter adapter(sink);
  TensorReceiver receiver(&adapter);
  RangeResult result;
  result.status = ReceiveStateDict(
      client.connection(), proto,
      [sink](const v1::Header& header) {
        return sink->OnHeader({VersionFromProto(header.version()), header.step(),
                               header.layout_digest(), header.total_bytes()});
      },
      &receiver, cancellation);
  result.received_bytes = receiver.received_bytes();
  for (size_t i = 0; i < receiver.tensors().size(); ++i) {
    result.digests.push_back(receiver.digest(i));
    // A tied tensor is as good as the bytes that it shares.
    result.verified.push_back(receiver.finished() && receiver.verified(i));
    result.stated.push_back(receiver.tensors()[i].stated_xxh3);
  }
  return result;
}

absl::StatusOr<StateTable> FetchTable(const Client& client, RangeRequest request,
                                      Cancellation* cancellation) {
  // What is on its way when the stream is ended has been sent for nothing, so it is asked for one
  // byte; where there is none, for all.
  request.digests = false;
  request.ranges = {{0, 1}};
  TableSink sink;
  absl::Status status = FetchRanges(client, request, &sink, cancellation).status;
  if (GetReason(status) == Reason::kRangeOutsideLayout) {
    request.ranges.clear();
    status = FetchRanges(client, request, &sink, cancellation).status;
  }
  if (!sink.has_table()) return status;
  return std::move(sink.table());
}

}  // namespace modelstate::client
