#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/server_stream_handler.h"
#include "server/rpc/service.h"
#include "server/rpc/state_stream.h"
#include "server/state/optimizer_tensors.h"

namespace modelstate {
namespace {

constexpr uint64_t kMinChunkBytes = 1024;

absl::StatusOr<PinTable::Pin> FindPin(Runtime& runtime, const v1::StreamStateDictRequest& request,
                                      const ModuleInstance& module) {
  MS_ASSIGN_OR_RETURN(PinTable::Pin pin, runtime.pins->Find(request.snapshot_id()));
  if (pin.module.get() == &module) return pin;
  return MakeError(Reason::kSnapshotNotFound,
                   absl::StrCat("snapshot_id is of module \"", pin.module->name(), "\", not of \"",
                                module.name(), "\""),
                   {{"snapshot_id", pin.id}, {"module", module.name()}});
}

absl::StatusOr<Snapshot> TakeSnapshot(Runtime& runtime, const v1::StreamStateDictRequest& request,
                                      ModuleInstance& module) {
  switch (request.at_case()) {
    case v1::StreamStateDictRequest::kVersion:
      return module.HoldNumber(request.version());
    case v1::StreamStateDictRequest::kSnapshotId: {
      MS_ASSIGN_OR_RETURN(const PinTable::Pin pin, FindPin(runtime, request, module));
      return pin.snapshot;
    }
    default:
      return module.Hold();
  }
}

// Of a version that the caller has: `field` of the request.
absl::Status CheckSameLife(absl::string_view field, const v1::Version& have,
                           const ModuleVersion& version) {
  if (have.incarnation() == version.version.incarnation) return absl::OkStatus();
  return MakeError(Reason::kIncarnationChanged,
                   absl::StrCat(field,
                                " is of another life of the module (it was made anew, or the "
                                "server was started again): fetch without it"),
                   {{"incarnation", absl::StrCat(version.version.incarnation)}});
}

absl::StatusOr<StateStream::Options> OptionsOf(const Runtime& runtime,
                                               const v1::StreamStateDictRequest& request) {
  if (request.has_changed_since() && (request.ranges_size() > 0 || request.optimizer_state())) {
    return MakeError(Reason::kInvalidField,
                     "changed_since goes together with neither ranges nor optimizer_state; what "
                     "changed comes whole, and optimizer state changes with every step",
                     {{"field", "changed_since"}});
  }
  StateStream::Options options;
  options.module = request.module();
  options.skip_digests = request.skip_digests();
  options.cast_budget = runtime.cast_budget;
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

absl::Status CheckLayout(const v1::StreamStateDictRequest& request, const StateView& view) {
  if (request.layout_digest().empty() || request.layout_digest() == view.layout.digest()) {
    return absl::OkStatus();
  }
  return MakeError(
      Reason::kLayoutMismatch,
      absl::StrCat("layout_digest is ", request.layout_digest(), ", but this selection of \"",
                   request.module(), "\" has layout ", view.layout.digest(),
                   ": names, dtypes or shapes differ; begin anew without it"),
      {{"requested", request.layout_digest()}, {"layout_digest", view.layout.digest()}});
}

// The optimizer state is of the newest version: of an older one there is none any more.
absl::Status CheckNewest(const v1::StreamStateDictRequest& request, const ModuleVersion& version) {
  if (!request.has_version() || request.version() == version.version.number) {
    return absl::OkStatus();
  }
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("version is ", request.version(), ", but version ", version.version.number,
                   " is current, and optimizer state is kept of no other one: leave the version "
                   "out, or pin it with optimizer_state (PinSnapshot) and give its snapshot_id"),
      {{"field", "version"}});
}

absl::StatusOr<StateStream::Contents> WithOptimizerState(const CapturedState& held,
                                                         const Selection& selection) {
  StateStream::Contents contents;
  contents.snapshot = held.snapshot;
  const ModuleSchema& schema = *held.snapshot->schema;
  MS_ASSIGN_OR_RETURN(const std::shared_ptr<const StateView> view, schema.View(selection));
  MS_ASSIGN_OR_RETURN(const ModuleSchema::Listing parameters, SelectStateful(schema, selection));
  OptimizerTensors tensors =
      ListOptimizerTensors(schema, *held.optimizer, *parameters, held.optimizer_state);
  contents.view = ExtendView(*view, std::move(tensors.specs));
  contents.optimizer = std::move(tensors.values);
  return contents;
}

class StreamStateDictHandler final : public ServerStreamHandler {
 public:
  StreamStateDictHandler(Runtime* runtime, Call* call)
      : ServerStreamHandler(call), runtime_(*runtime) {}

 private:
  absl::Status OnRequest(grpc::ByteBuffer* message) override {
    return ParseRequest(message, &request_);
  }

  Turn Next(grpc::ByteBuffer* message, absl::Status* status) override {
    if (gone()) {
      *status = GoneStatus();
      return Turn::kEnd;
    }
    if (status_.ok() && stream_ == nullptr) {
      status_ = Open();
      if (status_.ok() && stream_ == nullptr) return Turn::kWait;
      if (stream_ != nullptr && stream_->needs_digests()) DigestParts();
      if (stream_ != nullptr && !digesting_) Advance();
    }
    if (digesting_) {
      if (!digested_.load(std::memory_order_acquire)) return Turn::kWait;
      digesting_ = false;
      if (digest_status_.ok()) {
        Advance();
      } else {
        status_ = WhyItFailed(digest_status_);
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
  void Prefetch() override { Advance(); }

  void Advance() {
    absl::StatusOr<std::optional<grpc::ByteBuffer>> next = stream_->Next();
    next_ = next.ok() ? *std::move(next) : std::nullopt;
    if (!next.ok()) status_ = WhyItFailed(next.status());
  }

  // What a device that failed under the stream says is less than what the module does.
  absl::Status WhyItFailed(absl::Status status) const {
    absl::Status usable = module_->CheckUsable();
    return usable.ok() ? status : usable;
  }

  void DigestParts() {
    digesting_ = true;
    runtime_.PostIo([this, self = Share()] {
      digest_status_ = stream_->DigestParts([this] { return !gone(); });
      digested_.store(true, std::memory_order_release);
      Wake();
    });
  }

  // Makes the stream, or leaves it null while the optimizer state is being held.
  absl::Status Open() {
    if (holding_) {
      if (!held_.load(std::memory_order_acquire)) return absl::OkStatus();
      MS_RETURN_IF_ERROR(with_optimizer_.status());
      return OpenHeld(*std::exchange(with_optimizer_, absl::CancelledError()));
    }
    MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(request_.module()));
    MS_ASSIGN_OR_RETURN(options_, OptionsOf(runtime_, request_));
    MS_ASSIGN_OR_RETURN(selection_, SelectionFromProto(request_.selection()));
    if (!request_.has_snapshot_id()) {
      // Looked at before it is held: who is up to date needs no memory, so is not refused for it.
      const VersionRef current = module_->Current();
      const bool asked = !request_.has_version() || request_.version() == current->version.number;
      if (asked && !current->schema->empty()) MS_RETURN_IF_ERROR(CheckIfNewer(*current));
      if (stream_ != nullptr) return absl::OkStatus();
    }
    if (!request_.optimizer_state()) {
      StateStream::Contents contents;
      MS_ASSIGN_OR_RETURN(contents.snapshot, TakeSnapshot(runtime_, request_, *module_));
      MS_RETURN_IF_ERROR(CheckIfNewer(*contents.snapshot));
      if (stream_ != nullptr) return absl::OkStatus();
      MS_ASSIGN_OR_RETURN(contents.view, contents.snapshot->schema->View(selection_));
      MS_RETURN_IF_ERROR(CheckLayout(request_, *contents.view));
      if (request_.has_changed_since()) MS_RETURN_IF_ERROR(KeepWhatChanged(&contents));
      return Start(std::move(contents));
    }
    if (request_.has_snapshot_id()) {
      MS_ASSIGN_OR_RETURN(const PinTable::Pin pin, FindPin(runtime_, request_, *module_));
      if (pin.optimizer != nullptr) return OpenHeld(*pin.optimizer);
      return MakeError(Reason::kInvalidField,
                       "optimizer_state: the snapshot was pinned without it; pin the module with "
                       "optimizer_state (PinSnapshot)",
                       {{"field", "optimizer_state"}, {"snapshot_id", pin.id}});
    }
    MS_RETURN_IF_ERROR(CheckNewest(request_, *module_->Current()));
    // Worked out here, so that the strand only looks it up; what is wrong with it is told there.
    SelectStateful(*module_->Current()->schema, selection_).IgnoreError();
    holding_ = true;
    module_->HoldWithOptimizer(selection_,
                               [this, self = Share()](absl::StatusOr<CapturedState> held) {
                                 with_optimizer_ = std::move(held);
                                 held_.store(true, std::memory_order_release);
                                 // Off the strand: the table of a large module takes its time.
                                 runtime_.PostIo([self] { self->Wake(); });
                               });
    return absl::OkStatus();
  }

  absl::Status OpenHeld(const CapturedState& held) {
    MS_RETURN_IF_ERROR(CheckNewest(request_, *held.snapshot));
    MS_RETURN_IF_ERROR(CheckIfNewer(*held.snapshot));
    if (stream_ != nullptr) return absl::OkStatus();
    MS_ASSIGN_OR_RETURN(StateStream::Contents contents, WithOptimizerState(held, selection_));
    MS_RETURN_IF_ERROR(CheckLayout(request_, *contents.view));
    return Start(std::move(contents));
  }

  // Where the caller has `version` already, the stream says so.
  absl::Status CheckIfNewer(const ModuleVersion& version) {
    if (!request_.has_if_newer_than()) return absl::OkStatus();
    MS_RETURN_IF_ERROR(CheckSameLife("if_newer_than", request_.if_newer_than(), version));
    if (request_.if_newer_than().number() < version.version.number) return absl::OkStatus();
    std::shared_ptr<const StateView> view;
    // With optimizer state the layout is known when that is held, which this spares.
    if (!request_.optimizer_state()) {
      MS_ASSIGN_OR_RETURN(view, version.schema->View(selection_));
      MS_RETURN_IF_ERROR(CheckLayout(request_, *view));
    }
    stream_ = StateStream::NotModified(request_.module(), version, view.get());
    return absl::OkStatus();
  }

  absl::Status KeepWhatChanged(StateStream::Contents* contents) const {
    const ModuleVersion& version = *contents->snapshot;
    const v1::Version& base = request_.changed_since();
    MS_RETURN_IF_ERROR(CheckSameLife("changed_since", base, version));
    if (base.number() > version.version.number) {
      return MakeError(
          Reason::kInvalidField,
          absl::StrCat("changed_since is version ", base.number(),
                       ", which is newer than the one that is asked for, ", version.version.number),
          {{"field", "changed_since"}});
    }
    contents->base = VersionFromProto(base);
    contents->selection_layout_digest = contents->view->layout.digest();
    contents->view = version.schema->Part(*contents->view, [&](uint32_t owner) {
      return version.changed_version[owner] > base.number();
    });
    return absl::OkStatus();
  }

  absl::Status Start(StateStream::Contents contents) {
    MS_ASSIGN_OR_RETURN(stream_, StateStream::Create(std::move(contents), std::move(options_)));
    return absl::OkStatus();
  }

  Runtime& runtime_;
  v1::StreamStateDictRequest request_;
  absl::Status status_;
  std::shared_ptr<ModuleInstance> module_;
  StateStream::Options options_;
  Selection selection_;
  bool holding_ = false;           // HoldWithOptimizer was called
  std::atomic<bool> held_{false};  // and has answered:
  absl::StatusOr<CapturedState> with_optimizer_;
  std::unique_ptr<StateStream> stream_;
  bool digesting_ = false;             // DigestParts was called
  std::atomic<bool> digested_{false};  // and has ended:
  absl::Status digest_status_;
  std::optional<grpc::ByteBuffer> next_;
};

}  // namespace

RefPtr<CallHandler> ModelStateService::StreamStateDict(Call* call) {
  return RefPtr<CallHandler>::Adopt(new StreamStateDictHandler(&runtime_, call));
}

}  // namespace modelstate
