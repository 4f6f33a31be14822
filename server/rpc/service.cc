#include "server/rpc/service.h"

#include "absl/strings/str_cat.h"
#include "server/rpc/load_optimizer_state.h"
#include "server/rpc/load_push.h"
#include "server/rpc/step_push.h"

namespace modelstate {
namespace {

std::string Path(const char* name) { return absl::StrCat("/modelstate.v1.ModelState/", name); }

}  // namespace

template <typename Request, typename Response>
Call::Method ModelStateService::Unary(const char* name,
                                      void (ModelStateService::*answer)(UnaryCall*, const Request*,
                                                                        Response*)) {
  const auto bound = [this, answer](UnaryCall* call, const Request* request, Response* response) {
    (this->*answer)(call, request, response);
  };
  using Handler = UnaryCallOf<Request, Response, decltype(bound)>;
  Call::Method method;
  method.path = Path(name);
  method.make_handler = [this, bound](Call* call) {
    return RefPtr<CallHandler>::Adopt(new Handler(&runtime_, call, bound));
  };
  return method;
}

Call::Method ModelStateService::Stream(const char* name,
                                       RefPtr<CallHandler> (ModelStateService::*make)(Call*)) {
  Call::Method method;
  method.path = Path(name);
  method.make_handler = [this, make](Call* call) { return (this->*make)(call); };
  return method;
}

template <typename Push>
Call::Method ModelStateService::StreamFrom(const char* name) {
  Call::Method method;
  method.path = Path(name);
  method.make_handler = [this](Call* call) {
    return RefPtr<CallHandler>::Adopt(new Push(&runtime_, call));
  };
  return method;
}

std::vector<Call::Method> ModelStateService::methods() {
  using Self = ModelStateService;
  return {
      Unary("GetServerInfo", &Self::GetServerInfo),
      Unary("CreateModule", &Self::CreateModule),
      Unary("GetModule", &Self::GetModule),
      Unary("ListModules", &Self::ListModules),
      Unary("DeleteModule", &Self::DeleteModule),
      Unary("MoveModule", &Self::MoveModule),
      Unary("SetRequiresGrad", &Self::SetRequiresGrad),
      Unary("GetModuleSpec", &Self::GetModuleSpec),
      Unary("ListVersions", &Self::ListVersions),
      Unary("ListParameters", &Self::ListParameters),
      Unary("ListBuffers", &Self::ListBuffers),
      Unary("GetTensor", &Self::GetTensor),
      Unary("ListOptimizerState", &Self::ListOptimizerState),
      Unary("PinSnapshot", &Self::PinSnapshot),
      Unary("ReleaseSnapshot", &Self::ReleaseSnapshot),
      Unary("ConfigureOptimizer", &Self::ConfigureOptimizer),
      Unary("GetOptimizer", &Self::GetOptimizer),
      Unary("ListCheckpoints", &Self::ListCheckpoints),
      Unary("DeleteCheckpoint", &Self::DeleteCheckpoint),
      Stream("LoadCheckpoint", &Self::LoadCheckpoint),
      Stream("SaveCheckpoint", &Self::SaveCheckpoint),
      Stream("WatchModule", &Self::WatchModule),
      Stream("StreamStateDict", &Self::StreamStateDict),
      StreamFrom<StepPush>("ApplyStep"),
      StreamFrom<LoadPush>("LoadStateDict"),
      StreamFrom<LoadOptimizerStatePush>("LoadOptimizerState"),
  };
}

}  // namespace modelstate
