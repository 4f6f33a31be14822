#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "common/base/status.h"
#include "server/rpc/checkpoint_load.h"
#include "server/rpc/job_handler.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/module_factory.h"
#include "server/rpc/service.h"

namespace modelstate {
namespace {

class LoadCheckpointHandler final
    : public JobHandler<v1::LoadCheckpointRequest, v1::LoadCheckpointResponse> {
 public:
  using JobHandler::JobHandler;

 private:
  void Run() override {
    if (absl::Status status = Load(); !status.ok()) Fail(std::move(status));
  }

  // Everything up to the commit, which ends the job.
  absl::Status Load() {
    MS_ASSIGN_OR_RETURN(LoadOptions options, LoadOptionsFromProto(request().options()));
    MS_RETURN_IF_ERROR(FindOrCreateModule(options.dry_run));
    MS_ASSIGN_OR_RETURN(const OpenedCheckpoint opened,
                        OpenForLoad(runtime_, request().path(), request().state_dict_key()));
    opened.source->Describe(&options);
    if (options.dry_run) return DryRun(opened, options);
    MS_ASSIGN_OR_RETURN(PreparedLoad load, PrepareLoad(runtime_, *module_, opened, options,
                                                       request().weights_only(), control()));
    MS_RETURN_IF_ERROR(control().CheckNotCancelled());
    v1::LoadCheckpointResponse response;
    v1::LoadCheckpointResult* result = response.mutable_result();
    LoadPlanToProto(load.staged.plan, options.skip_keys, result->mutable_load());
    result->set_format(opened.source->format());
    result->set_path(opened.path);
    result->set_optimizer_loaded(load.restored && load.restored->optimizer != nullptr);
    result->set_read_bytes(opened.source->read_bytes());
    const uint64_t bytes = load.staged.plan.total_bytes;
    control().Report({"commit", bytes, bytes});
    module_->CommitLoad(
        std::move(load.staged), std::nullopt, std::move(load.restored),
        [this, self = Share(),
         response = std::move(response)](absl::StatusOr<VersionRef> version) mutable {
          if (!version.ok()) return Fail(version.status());
          ModuleToProto(*module_, **version,
                        response.mutable_result()->mutable_load()->mutable_module());
          End(absl::OkStatus(), std::move(response));
        });
    return absl::OkStatus();
  }

  // Only headers have been read. A module that would be created is not: the plan is for none.
  absl::Status DryRun(const OpenedCheckpoint& opened, const LoadOptions& options) {
    std::shared_ptr<const ModuleSchema> schema;
    if (module_ != nullptr) {
      schema = module_->Current()->schema;
    } else {
      MS_ASSIGN_OR_RETURN(schema, ModuleSchema::Create({}, 1));
    }
    MS_ASSIGN_OR_RETURN(const LoadPlan plan, LoadPlan::Create(request().module(), std::move(schema),
                                                              opened.source->incoming(), options));
    v1::LoadCheckpointResponse response;
    v1::LoadCheckpointResult* result = response.mutable_result();
    LoadPlanToProto(plan, options.skip_keys, result->mutable_load());
    if (module_ != nullptr) {
      ModuleToProto(*module_, *module_->Current(), result->mutable_load()->mutable_module());
    }
    result->set_format(opened.source->format());
    result->set_path(opened.path);
    End(absl::OkStatus(), std::move(response));
    return absl::OkStatus();
  }

  absl::Status FindOrCreateModule(bool dry_run) {
    absl::StatusOr<std::shared_ptr<ModuleInstance>> module =
        runtime_.FindModule(request().module());
    if (!module.ok() && request().create_module() &&
        GetReason(module.status()) == Reason::kModuleNotFound) {
      if (dry_run) return ModuleRegistry::ValidateName(request().module());
      module = CreateEmptyModule(runtime_, request().module());
      created_ = module.ok();
    }
    MS_RETURN_IF_ERROR(module.status());
    module_ = *std::move(module);
    return absl::OkStatus();
  }

  // A module that was made for this load goes with it, unless another load has filled it.
  void Fail(absl::Status status) {
    if (!created_) return End(std::move(status));
    runtime_.registry->DeleteIfEmpty(
        module_, [this, self = Share(), status = std::move(status)] { End(status); });
  }

  std::shared_ptr<ModuleInstance> module_;
  bool created_ = false;
};

}  // namespace

RefPtr<CallHandler> ModelStateService::LoadCheckpoint(Call* call) {
  return RefPtr<CallHandler>::Adopt(new LoadCheckpointHandler(&runtime_, call));
}

}  // namespace modelstate
