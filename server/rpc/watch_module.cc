#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/rpc/server_stream_handler.h"
#include "server/rpc/service.h"
#include "server/rpc/watch_hub.h"

namespace modelstate {
namespace {

class WatchModuleHandler final : public ServerStreamHandler {
 public:
  WatchModuleHandler(Runtime* runtime, Call* call)
      : ServerStreamHandler(call), runtime_(*runtime) {}

 private:
  absl::Status OnRequest(grpc::ByteBuffer* message) override {
    v1::WatchModuleRequest request;
    MS_RETURN_IF_ERROR(ParseRequest(message, &request));
    MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(request.module()));
    drain_hook_ = runtime_.calls.AddDrainHook([this] { Wake(); });
    return absl::OkStatus();
  }

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

  Runtime& runtime_;
  std::shared_ptr<ModuleInstance> module_;
  std::unique_ptr<WatchFanOut::Seat> seat_;
  uint64_t drain_hook_ = 0;
  Version sent_;
};

}  // namespace

RefPtr<CallHandler> ModelStateService::WatchModule(Call* call) {
  return RefPtr<CallHandler>::Adopt(new WatchModuleHandler(&runtime_, call));
}

}  // namespace modelstate
