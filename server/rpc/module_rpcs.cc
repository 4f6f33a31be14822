#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/module_factory.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"

namespace modelstate {

void ModelStateService::CreateModule(UnaryCall* call, const v1::CreateModuleRequest* request,
                                     v1::Module* response) {
  call->AnswerOnIoThread([this, request, response]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        CreateModuleFromSpec(runtime_, *request));
    ModuleToProto(*module, *module->Current(), response);
    return absl::OkStatus();
  });
}

void ModelStateService::GetModule(UnaryCall* call, const v1::GetModuleRequest* request,
                                  v1::Module* response) {
  call->AnswerNow([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    ModuleToProto(*module, *module->Current(), response);
    return absl::OkStatus();
  });
}

void ModelStateService::ListModules(UnaryCall* call, const v1::ListModulesRequest* request,
                                    v1::ListModulesResponse* response) {
  call->AnswerNow([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(const size_t page_size, PageSize(request->page_size(), 100, 1000));
    const std::string scope = PageScope(v1::ListModulesRequest(), "modules");
    MS_ASSIGN_OR_RETURN(const std::string after, DecodePageToken(scope, request->page_token()));
    const auto modules = runtime_.registry->List(after, page_size + 1);
    size_t count = 0;
    size_t bytes = 0;  // metadata may be large
    for (; count < modules.size() && count < page_size && bytes < kMaxPageBytes; ++count) {
      v1::Module* module = response->add_modules();
      ModuleToProto(*modules[count], *modules[count]->Current(), module);
      bytes += module->ByteSizeLong();
    }
    if (modules.size() > count) {
      response->set_next_page_token(EncodePageToken(scope, modules[count - 1]->name()));
    }
    return absl::OkStatus();
  });
}

void ModelStateService::DeleteModule(UnaryCall* call, const v1::DeleteModuleRequest* request,
                                     v1::DeleteModuleResponse*) {
  call->AnswerLater([&]() -> absl::Status {
    MS_RETURN_IF_ERROR(runtime_.FindModule(request->module()).status());
    return runtime_.registry->Delete(request->module(), [this, call](const ModuleInstance& module) {
      runtime_.pins->ReleaseModule(module);
      call->Finish(absl::OkStatus());
    });
  });
}

void ModelStateService::MoveModule(UnaryCall* call, const v1::MoveModuleRequest* request,
                                   v1::Module* response) {
  call->AnswerLater([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    Device* device = nullptr;
    if (!request->device().empty()) {
      MS_ASSIGN_OR_RETURN(device, runtime_.FindDevice(request->device()));
    }
    std::optional<DType> dtype;
    if (request->has_dtype()) {
      MS_ASSIGN_OR_RETURN(dtype, DTypeFromProto(request->dtype(), "dtype"));
    }
    if (device == nullptr && !dtype) {
      return MakeError(Reason::kInvalidField,
                       "neither device nor dtype is set: say where the module is to go, or what "
                       "its floating-point tensors are to become",
                       {{"field", "device"}});
    }
    ModuleInstance& moved = *module;
    moved.Move(device, dtype,
               [call, response, module = std::move(module)](absl::StatusOr<VersionRef> version) {
                 if (version.ok()) ModuleToProto(*module, **version, response);
                 call->Finish(version.status());
               });
    return absl::OkStatus();
  });
}

void ModelStateService::SetRequiresGrad(UnaryCall* call, const v1::SetRequiresGradRequest* request,
                                        v1::SetRequiresGradResponse* response) {
  call->AnswerLater([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    if (!request->has_selection()) {
      return MakeError(Reason::kInvalidField,
                       "selection is not set; give {\"globs\": [\"*\"]} for all parameters",
                       {{"field", "selection"}});
    }
    if (!request->has_requires_grad()) {
      return MakeError(Reason::kInvalidField, "requires_grad is not set: say true or false",
                       {{"field", "requires_grad"}});
    }
    MS_ASSIGN_OR_RETURN(Selection selection, SelectionFromProto(request->selection()));
    module->SetRequiresGrad(std::move(selection), request->requires_grad(),
                            [call, response](absl::StatusOr<ModuleInstance::FreezeResult> result) {
                              if (result.ok()) {
                                VersionToProto(result->version, response->mutable_version());
                                response->set_changed(result->changed);
                              }
                              call->Finish(result.status());
                            });
    return absl::OkStatus();
  });
}

}  // namespace modelstate
