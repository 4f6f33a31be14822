#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/server_stream_handler.h"
#include "server/rpc/service.h"

namespace modelstate {
namespace {

class WatchModuleHandler final : public ServerStreamHandler<v1::WatchModuleResponse> {
 public:
  WatchModuleHandler(Runtime& runtime, grpc::CallbackServerContext* context,
                     const v1::WatchModuleRequest* request)
      : ServerStreamHandler(runtime, context) {
    absl::StatusOr<std::shared_ptr<ModuleInstance>> module = runtime.FindModule(request->module());
    if (!module.ok()) {
      status_ = module.status();
      return;
    }
    module_ = *std::move(module);
    subscription_ = module_->Subscribe([this] { Wake(); });
    drain_hook_ = runtime.calls.AddDrainHook([this] { Wake(); });
  }

 private:
  Turn Next(v1::WatchModuleResponse* message, absl::Status* status) override {
    *status = Ended();
    if (!status->ok()) return Turn::kEnd;
    const VersionRef version = module_->Current();
    if (version->version == sent_) return Turn::kWait;
    sent_ = version->version;
    message->Clear();
    ModuleToProto(*module_, *version, message->mutable_module());
    message->set_last_mutation(static_cast<v1::MutationKind>(version->last_mutation));
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

  // Both wait for a Wake of theirs that is running.
  void OnOver() override {
    subscription_.reset();
    if (drain_hook_ != 0) runtime_.calls.RemoveDrainHook(drain_hook_);
  }

  absl::Status status_;
  std::shared_ptr<ModuleInstance> module_;
  std::unique_ptr<ModuleInstance::Subscription> subscription_;
  uint64_t drain_hook_ = 0;
  Version sent_;
};

}  // namespace

grpc::ServerWriteReactor<v1::WatchModuleResponse>* ModelStateService::WatchModule(
    Context* context, const v1::WatchModuleRequest* request) {
  auto* handler = new WatchModuleHandler(runtime_, context, request);
  handler->Wake();
  return handler;
}

}  // namespace modelstate
