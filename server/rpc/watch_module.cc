#include <grpcpp/support/proto_buffer_reader.h>

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/rpc/server_stream_handler.h"
#include "server/rpc/service.h"
#include "server/rpc/watch_hub.h"

namespace modelstate {
namespace {

class WatchModuleHandler final : public ServerStreamHandler<grpc::ByteBuffer> {
 public:
  WatchModuleHandler(Runtime& runtime, grpc::CallbackServerContext* context,
                     const grpc::ByteBuffer* bytes)
      : ServerStreamHandler(runtime, context) {
    grpc::ByteBuffer copy = *bytes;  // parsing needs a buffer of its own: reading one marks it
    grpc::ProtoBufferReader reader(&copy);
    v1::WatchModuleRequest request;
    if (!request.ParseFromZeroCopyStream(&reader)) {
      status_ =
          MakeError(Reason::kInvalidField, "the request is not a valid WatchModuleRequest message");
      return;
    }
    absl::StatusOr<std::shared_ptr<ModuleInstance>> module = runtime.FindModule(request.module());
    if (!module.ok()) {
      status_ = module.status();
      return;
    }
    module_ = *std::move(module);
    drain_hook_ = runtime.calls.AddDrainHook([this] { Wake(); });
  }

 private:
  Turn Next(grpc::ByteBuffer* message, absl::Status* status) override {
    *status = Ended();
    if (!status->ok()) return Turn::kEnd;
    if (seat_ == nullptr) {
      // In a turn, because a Wake may come before Join returns.
      seat_ = runtime_.watches->Join(module_, [self = Share()] { self->Wake(); });
    }
    // Not the current version: the hub says when the next one is due, else a write that is done
    // would be followed by another for as long as the module steps.
    const std::shared_ptr<const WatchHub::Message> latest = seat_->hub().latest();
    if (latest->version == sent_) return Turn::kWait;
    sent_ = latest->version;
    *message = latest->bytes;
    return Turn::kMessage;
  }

  absl::Status Ended() const {
    if (!status_.ok()) return status_;
    if (gone()) return GoneStatus();
    if (module_->deleted()) {
      return MakeError(Reason::kModuleDeleted,
                       absl::StrCat("module \"", module_->name(), "\" was deleted"),
                       {{"module", module_->name()}});
    }
    return runtime_.calls.draining() ? CallTracker::DrainingError() : absl::OkStatus();
  }

  void OnOver() override {
    seat_.reset();
    // Waits for a Wake of its own that is running.
    if (drain_hook_ != 0) runtime_.calls.RemoveDrainHook(drain_hook_);
  }

  absl::Status status_;
  std::shared_ptr<ModuleInstance> module_;
  std::unique_ptr<WatchFanOut::Seat> seat_;
  uint64_t drain_hook_ = 0;
  Version sent_;
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* ModelStateService::WatchModule(
    Context* context, const grpc::ByteBuffer* request) {
  auto* handler = new WatchModuleHandler(runtime_, context, request);
  handler->Wake();
  return handler;
}

}  // namespace modelstate
