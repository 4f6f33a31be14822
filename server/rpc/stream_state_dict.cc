#include <google/protobuf/io/zero_copy_stream.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/server_stream_handler.h"
#include "server/rpc/service.h"
#include "server/rpc/state_stream.h"

namespace modelstate {
namespace {

constexpr uint64_t kMinChunkBytes = 1024;

absl::Status WrongModule(const PinTable::Pin& pin, const std::string& module) {
  return MakeError(Reason::kSnapshotNotFound,
                   absl::StrCat("snapshot_id is of module \"", pin.module->name(), "\", not of \"",
                                module, "\""),
                   {{"snapshot_id", pin.id}, {"module", module}});
}

absl::StatusOr<Snapshot> TakeSnapshot(Runtime& runtime, const v1::StreamStateDictRequest& request,
                                      ModuleInstance& module) {
  switch (request.at_case()) {
    case v1::StreamStateDictRequest::kVersion:
      return module.HoldNumber(request.version());
    case v1::StreamStateDictRequest::kSnapshotId: {
      MS_ASSIGN_OR_RETURN(PinTable::Pin pin, runtime.pins->Find(request.snapshot_id()));
      if (pin.module.get() != &module) return WrongModule(pin, module.name());
      return pin.snapshot;
    }
    default:
      return module.Hold();
  }
}

// Whether the caller has this version already.
absl::StatusOr<bool> IsNotModified(const v1::Version& have, const ModuleVersion& version) {
  if (have.incarnation() != version.version.incarnation) {
    return MakeError(Reason::kIncarnationChanged,
                     "if_newer_than is of another life of the module (it was made anew, or the "
                     "server was started again): fetch without it",
                     {{"incarnation", absl::StrCat(version.version.incarnation)}});
  }
  return have.number() >= version.version.number;
}

absl::StatusOr<StateStream::Options> OptionsOf(const Runtime& runtime,
                                               const v1::StreamStateDictRequest& request) {
  if (request.has_changed_since()) {
    return MakeError(
        Reason::kNotImplemented,
        "changed_since is not built yet; leave it out to get every tensor, or use if_newer_than");
  }
  if (request.optimizer_state()) {
    return MakeError(Reason::kNotImplemented,
                     "optimizer_state is not built yet: leave it out; ListOptimizerState shows it, "
                     "and SaveCheckpoint keeps it");
  }
  StateStream::Options options;
  options.module = request.module();
  options.skip_digests = request.skip_digests();
  if (request.chunk_bytes() != 0) {
    if (request.chunk_bytes() > runtime.max_chunk_bytes || request.chunk_bytes() < kMinChunkBytes) {
      return MakeError(
          Reason::kInvalidField,
          absl::StrCat("chunk_bytes is ", request.chunk_bytes(), "; it is ", kMinChunkBytes, " to ",
                       runtime.max_chunk_bytes, ", and 0 lets the server choose"),
          {{"field", "chunk_bytes"}});
    }
    options.chunk_bytes = request.chunk_bytes();
  } else {
    options.chunk_bytes = std::min(StateStream::kDefaultChunkBytes, runtime.max_chunk_bytes);
  }
  MS_ASSIGN_OR_RETURN(options.ranges, ByteRangesFromProto(request.ranges()));
  const bool asked_for_nothing = request.ranges_size() > 0 && options.ranges.empty();
  if (asked_for_nothing) {
    return MakeError(Reason::kInvalidField,
                     "ranges are all empty; leave them out to get everything",
                     {{"field", "ranges"}});
  }
  return options;
}

absl::StatusOr<std::shared_ptr<const StateView>> ViewOf(const v1::StreamStateDictRequest& request,
                                                        const Selection& selection,
                                                        const ModuleVersion& version) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const StateView> view, version.schema->View(selection));
  if (!request.layout_digest().empty() && request.layout_digest() != view->layout.digest()) {
    return MakeError(
        Reason::kLayoutMismatch,
        absl::StrCat("layout_digest is ", request.layout_digest(), ", but this selection of \"",
                     request.module(), "\" has layout ", view->layout.digest(),
                     ": names, dtypes or shapes differ; begin anew without it"),
        {{"requested", request.layout_digest()}, {"layout_digest", view->layout.digest()}});
  }
  return view;
}

absl::StatusOr<std::unique_ptr<StateStream>> OpenStream(Runtime& runtime,
                                                        const v1::StreamStateDictRequest& request) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module, runtime.FindModule(request.module()));
  MS_ASSIGN_OR_RETURN(StateStream::Options options, OptionsOf(runtime, request));
  MS_ASSIGN_OR_RETURN(const Selection selection, SelectionFromProto(request.selection()));
  const auto not_modified =
      [&](const ModuleVersion& version) -> absl::StatusOr<std::unique_ptr<StateStream>> {
    MS_ASSIGN_OR_RETURN(const bool current, IsNotModified(request.if_newer_than(), version));
    if (!current) return nullptr;
    MS_ASSIGN_OR_RETURN(std::shared_ptr<const StateView> view, ViewOf(request, selection, version));
    return StateStream::NotModified(request.module(), version, *view);
  };
  if (request.has_if_newer_than() && !request.has_snapshot_id()) {
    // Looked at before it is held: who is up to date needs no memory, so is not refused for it.
    const VersionRef current = module->Current();
    const bool asked = !request.has_version() || request.version() == current->version.number;
    if (asked && !current->schema->empty()) {
      MS_ASSIGN_OR_RETURN(std::unique_ptr<StateStream> stream, not_modified(*current));
      if (stream != nullptr) return stream;
    }
  }
  MS_ASSIGN_OR_RETURN(Snapshot snapshot, TakeSnapshot(runtime, request, *module));
  if (request.has_if_newer_than()) {
    MS_ASSIGN_OR_RETURN(std::unique_ptr<StateStream> stream, not_modified(*snapshot));
    if (stream != nullptr) return stream;
  }
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const StateView> view, ViewOf(request, selection, *snapshot));
  return StateStream::Create(std::move(snapshot), std::move(view), std::move(options));
}

class StreamStateDictHandler final : public ServerStreamHandler<grpc::ByteBuffer> {
 public:
  StreamStateDictHandler(Runtime& runtime, grpc::CallbackServerContext* context,
                         const grpc::ByteBuffer* request)
      : ServerStreamHandler(runtime, context) {
    // Parsing needs a buffer of its own: reading one marks it.
    grpc::ByteBuffer bytes = *request;
    grpc::ProtoBufferReader reader(&bytes);
    if (!request_.ParseFromZeroCopyStream(&reader)) {
      status_ = MakeError(Reason::kInvalidField,
                          "the request is not a valid StreamStateDictRequest message");
    }
  }

 private:
  Turn Next(grpc::ByteBuffer* message, absl::Status* status) override {
    if (gone()) {
      *status = GoneStatus();
      return Turn::kEnd;
    }
    if (stream_ == nullptr && status_.ok()) {
      absl::StatusOr<std::unique_ptr<StateStream>> stream = OpenStream(runtime_, request_);
      if (stream.ok()) {
        stream_ = *std::move(stream);
        next_ = stream_->Next();
      } else {
        status_ = stream.status();
      }
    }
    if (!status_.ok() || !next_) {
      *status = status_;
      return Turn::kEnd;
    }
    *message = *std::move(next_);
    return Turn::kMessage;
  }

  // Two chunks at most: the one on its way, and this.
  void Prefetch() override { next_ = stream_->Next(); }

  v1::StreamStateDictRequest request_;
  absl::Status status_;
  std::unique_ptr<StateStream> stream_;
  std::optional<grpc::ByteBuffer> next_;
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* ModelStateService::StreamStateDict(
    Context* context, const grpc::ByteBuffer* request) {
  auto* handler = new StreamStateDictHandler(runtime_, context, request);
  handler->Wake();
  return handler;
}

}  // namespace modelstate
