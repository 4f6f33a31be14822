#include <memory>
#include <utility>

#include "common/base/status.h"
#include "server/rpc/job_handler.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/service.h"

namespace modelstate {
namespace {

class SaveCheckpointHandler final : public JobHandler<v1::SaveCheckpointResponse> {
 public:
  SaveCheckpointHandler(Runtime& runtime, grpc::CallbackServerContext* context,
                        const v1::SaveCheckpointRequest* request)
      : JobHandler(runtime, context), request_(*request) {}

 private:
  void Run() override {
    if (absl::Status status = CaptureAndSave(); !status.ok()) End(std::move(status));
  }

  absl::Status CaptureAndSave() {
    MS_RETURN_IF_ERROR(RootDirectory::ValidatePath(request_.path()));
    MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(request_.module()));
    module_->Capture(
        !request_.weights_only(), [this, self = Share()](absl::StatusOr<CapturedState> state) {
          if (!state.ok()) return End(state.status());
          // From the strand back to where files may be touched.
          runtime_.PostIo([this, self, state = *std::move(state)]() mutable { Save(state); });
        });
    return absl::OkStatus();
  }

  void Save(CapturedState& state) {
    SaveOptions options;
    options.overwrite = request_.overwrite();
    options.weights_only = request_.weights_only();
    const auto deletion = module_->Subscribe([this] {
      if (module_->deleted()) CancelJob();
    });
    if (module_->deleted()) CancelJob();
    absl::StatusOr<CheckpointInfo> info =
        runtime_.checkpoints->Save(state, request_.path(), options, control());
    {
      const CapturedState ended = std::move(state);  // nothing is held when the caller hears of it
    }
    if (absl::IsCancelled(info.status()) && module_->deleted()) {
      return End(module_->CheckNotDeleted());
    }
    if (!info.ok()) return End(info.status());
    v1::SaveCheckpointResponse response;
    CheckpointToProto(*info, response.mutable_result());
    End(absl::OkStatus(), std::move(response));
  }

  const v1::SaveCheckpointRequest request_;
  std::shared_ptr<ModuleInstance> module_;
};

}  // namespace

grpc::ServerWriteReactor<v1::SaveCheckpointResponse>* ModelStateService::SaveCheckpoint(
    Context* context, const v1::SaveCheckpointRequest* request) {
  auto* handler = new SaveCheckpointHandler(runtime_, context, request);
  handler->Wake();
  return handler;
}

}  // namespace modelstate
