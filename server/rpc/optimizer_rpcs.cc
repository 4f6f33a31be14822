#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/optimizer_convert.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/service.h"

namespace modelstate {

void ModelStateService::ConfigureOptimizer(UnaryCall* call,
                                           const v1::ConfigureOptimizerRequest* request,
                                           v1::Optimizer* response) {
  call->AnswerLater([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    MS_ASSIGN_OR_RETURN(OptimizerConfig config, OptimizerConfigFromProto(request->optimizer()));
    const bool reset_state = request->reset_state();
    // Many globs against many names take a while, and nobody shall wait for that.
    runtime_.PostIo([call, response, module, config = std::move(config), reset_state]() mutable {
      module->ConfigureOptimizer(
          std::move(config), reset_state,
          [call, response, module](absl::StatusOr<ModuleInstance::ConfigureResult> result) {
            if (result.ok()) {
              OptimizerToProto(*module, *result->version, *module->optimizer(), response);
              response->set_dropped_count(result->dropped_count);
              response->mutable_dropped()->Assign(result->dropped.begin(), result->dropped.end());
            }
            call->Finish(result.status());
          });
    });
    return absl::OkStatus();
  });
}

void ModelStateService::GetOptimizer(UnaryCall* call, const v1::GetOptimizerRequest* request,
                                     v1::Optimizer* response) {
  call->AnswerNow([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    const std::shared_ptr<const Optimizer> optimizer = module->optimizer();
    if (optimizer == nullptr) {
      return MakeError(Reason::kNoOptimizer,
                       absl::StrCat("module \"", module->name(),
                                    "\" has no optimizer; set one with ConfigureOptimizer"),
                       {{"module", module->name()}});
    }
    OptimizerToProto(*module, *module->Current(), *optimizer, response);
    return absl::OkStatus();
  });
}

}  // namespace modelstate
