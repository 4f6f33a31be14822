#include "client/range_fetch.h"

#include <utility>

#include "client/fetch.h"
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

}  // namespace modelstate::client
