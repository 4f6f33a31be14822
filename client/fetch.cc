#include "client/fetch.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "client/raw_call.h"
#include "common/base/status.h"
#include "common/wire/convert.h"

namespace modelstate::client {

absl::Status ReceiveStateDict(const Connection& connection,
                              const v1::StreamStateDictRequest& request,
                              const std::function<absl::Status(const v1::Header&)>& on_header,
                              TensorReceiver* receiver, Cancellation* cancellation) {
  RawCall call(connection, "StreamStateDict", cancellation);
  // Where writing fails the call has ended, and Read and Finish tell why.
  if (call.Write(SerializeMessage(request))) call.WritesDone();
  bool not_modified = false;
  const auto take = [&](grpc::ByteBuffer* message) -> absl::Status {
    v1::Header header;
    MS_ASSIGN_OR_RETURN(const PartKind kind, receiver->Receive(message, &header));
    if (kind != PartKind::kHeader) return absl::OkStatus();
    MS_RETURN_IF_ERROR(on_header(header));
    not_modified = header.not_modified();
    TensorReceiver::Options options;
    options.tensor_count = header.tensor_count();
    options.total_bytes = header.total_bytes();
    options.canonical_layout = true;
    options.layout_digest = header.layout_digest();
    options.digests = !request.skip_digests();
    MS_ASSIGN_OR_RETURN(options.ranges, ByteRangesFromProto(request.ranges()));
    return receiver->Begin(std::move(options));
  };
  grpc::ByteBuffer message;
  while (call.Read(&message)) {
    absl::Status status = take(&message);
    message.Clear();
    if (!status.ok()) {
      call.Cancel();
      (void)call.Finish();
      return status;
    }
  }
  MS_RETURN_IF_ERROR(call.Finish());
  if (not_modified) return absl::OkStatus();
  return receiver->CheckFinished();
}

namespace {

// A wish: touching new memory for the first time takes longer in small pages than receiving it.
void PreferHugePages(uint8_t* memory, uint64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t skipped = (kHugePage - begin % kHugePage) % kHugePage;
  if (bytes < skipped + kHugePage) return;
  madvise(memory + skipped, (bytes - skipped) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

}  // namespace

class StateDictBuilder final : public TensorDestination {
 public:
  StateDictBuilder(const FetchOptions& options, StateDict* state)
      : options_(options), state_(*state) {}
  // What was not finished leaves its memory for the next attempt.
  ~StateDictBuilder() override {
    if (result_.data_ == nullptr) return;
    state_.data_ = std::move(result_.data_);
    state_.capacity_ = result_.capacity_;
  }

  absl::Status OnHeader(const v1::Header& header) {
    result_.module_ = header.module();
    result_.version_ = VersionFromProto(header.version());
    result_.step_ = header.step();
    result_.layout_digest_ = header.layout_digest();
    result_.not_modified_ = header.not_modified();
    progress_.phase = "fetch";
    progress_.total_bytes = header.total_bytes();
    return absl::OkStatus();
  }

  absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) override {
    result_.specs_.reserve(tensors.size());
    for (const ReceivedTensor& tensor : tensors) {
      if (tensor.values) {
        return absl::InternalError("the server sent elements in the table of a state_dict");
      }
      result_.specs_.push_back(tensor.spec);
    }
    result_.index_of_name_.reserve(tensors.size());
    for (size_t i = 0; i < result_.specs_.size(); ++i) {
      const TensorSpec& spec = result_.specs_[i];
      result_.index_of_name_.try_emplace({spec.name, spec.slot}, i);
    }
    // The receiver has compared them with the layout.
    result_.offsets_.reserve(tensors.size());
    for (const ReceivedTensor& tensor : tensors) result_.offsets_.push_back(tensor.offset);
    result_.total_bytes_ = progress_.total_bytes;
    return TakeMemory();
  }

  absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) override {
    return absl::MakeSpan(result_.data_.get() + result_.offsets_[index] + offset, max);
  }

  absl::Status OnChunkDone(uint64_t offset, uint64_t length) override {
    progress_.done_bytes = offset + length;
    if (options_.progress) options_.progress(progress_);
    return absl::OkStatus();
  }

  void Finish(const TensorReceiver& receiver) {
    if (result_.not_modified_) {  // only the header came
      state_.module_ = result_.module_;
      state_.version_ = result_.version_;
      state_.step_ = result_.step_;
      state_.layout_digest_ = result_.layout_digest_;
      state_.not_modified_ = true;
      return;
    }
    result_.verified_digests_ = receiver.verified_digests();
    state_ = std::move(result_);
  }

 private:
  // That of the old tensors, which end here, or new memory.
  absl::Status TakeMemory() {
    const uint64_t bytes = result_.total_bytes_;
    StateDict old = std::exchange(state_, StateDict());
    if (old.data_ != nullptr && old.capacity_ >= bytes) {
      result_.data_ = std::move(old.data_);
      result_.capacity_ = old.capacity_;
      return absl::OkStatus();
    }
    old = StateDict();
    // Not cleared: a page is touched first by the copy that fills it.
    result_.data_.reset(new (std::nothrow) uint8_t[bytes]);
    if (result_.data_ == nullptr) {
      return absl::ResourceExhaustedError("no memory here for the state_dict; fetch it to a file");
    }
    result_.capacity_ = bytes;
    PreferHugePages(result_.data_.get(), bytes);
    return absl::OkStatus();
  }

  const FetchOptions& options_;
  StateDict& state_;
  StateDict result_;
  Progress progress_;
};

std::optional<size_t> StateDict::Find(absl::string_view name, absl::string_view slot) const {
  const auto it = index_of_name_.find({name, slot});
  if (it == index_of_name_.end()) return std::nullopt;
  return it->second;
}

absl::StatusOr<StateDict> Client::Fetch(const std::string& module, const FetchOptions& options,
                                        Cancellation* cancellation) const {
  StateDict state;
  MS_RETURN_IF_ERROR(FetchInto(module, &state, options, cancellation));
  return state;
}

absl::Status Client::FetchInto(const std::string& module, StateDict* state,
                               const FetchOptions& options, Cancellation* cancellation) const {
  v1::StreamStateDictRequest request;
  request.set_module(module);
  SelectionToProto(options.selection, request.mutable_selection());
  if (options.version != 0) request.set_version(options.version);
  if (!options.snapshot_id.empty()) request.set_snapshot_id(options.snapshot_id);
  if (options.if_newer_than) {
    VersionToProto(*options.if_newer_than, request.mutable_if_newer_than());
  }
  if (options.changed_since) {
    VersionToProto(*options.changed_since, request.mutable_changed_since());
  }
  request.set_layout_digest(options.layout_digest);
  request.set_chunk_bytes(options.chunk_bytes);
  request.set_skip_digests(!options.digests);
  request.set_optimizer_state(options.optimizer_state);
  Backoff backoff(connection_->options());
  while (true) {
    StateDictBuilder builder(options, state);
    TensorReceiver receiver(&builder);
    absl::Status status = ReceiveStateDict(
        *connection_, request, [&](const v1::Header& header) { return builder.OnHeader(header); },
        &receiver, cancellation);
    if (status.ok()) {
      builder.Finish(receiver);
      return status;
    }
    if (!backoff.WaitBeforeRetry(status, cancellation)) return status;
  }
}

}  // namespace modelstate::client
