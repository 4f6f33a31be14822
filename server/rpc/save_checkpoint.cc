#include <memory>
#include <utility>

#include "common/base/status.h"
#include "server/rpc/job_handler.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/service.h"

namespace modelstate {
namespace {

class SaveCheckpointHandler final
    : public JobHandler<v1::SaveCheckpointRequest, v1::SaveCheckpointResponse> {
 public:
  using JobHandler::JobHandler;

 private:
  void Run() override {
    if (absl::Status status = CaptureAndSave(); !status.ok()) End(std::move(status));
  }

  absl::Status CaptureAndSave() {
    MS_RETURN_IF_ERROR(RootDirectory::ValidatePath(request().path()));
    MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(request().module()));
    module_->Capture(
        !request().weights_only(), [this, self = Share()](absl::StatusOr<CapturedState> state) {
          if (!state.ok()) return End(state.status());
          // From the strand back to where files may be touched.
          runtime_.PostIo([this, self, state = *std::move(state)]() mutable { Save(state); });
        });
    return absl::OkStatus();
  }

  void Save(CapturedState& state) {
    SaveOptions options;
    options.overwrite = request().overwrite();
    options.weights_only = request().weights_only();
    const auto deletion = module_->Subscribe([this] {
      if (module_->deleted()) CancelJob();
    });
    if (module_->deleted()) CancelJob();
    absl::StatusOr<CheckpointInfo> info =
        runtime_.checkpoints->Save(state, request().path(), options, control());
    {
      const CapturedState ended = std::move(state);  // nothing is held when the caller hears of it
    }
    if (absl::IsCancelled(info.status()) && module_->deleted()) {
      return End(module_->CheckUsable());
    }
    if (!info.ok()) return End(info.status());
    v1::SaveCheckpointResponse response;
    CheckpointToProto(*info, response.mutable_result());
    runtime_.ApplyRetention(*std::move(info));
    End(absl::OkStatus(), std::move(response));
  }

  std::shared_ptr<ModuleInstance> module_;
};

}  // namespace

RefPtr<CallHandler> ModelStateService::SaveCheckpoint(Call* call) {
  return RefPtr<CallHandler>::Adopt(new SaveCheckpointHandler(&runtime_, call));
}

}  // namespace modelstate
