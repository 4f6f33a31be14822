#ifndef MODELSTATE_SERVER_RPC_SERVICE_H_
#define MODELSTATE_SERVER_RPC_SERVICE_H_

#include <vector>

#include "common/base/ref_counted.h"
#include "modelstate/v1/service.pb.h"
#include "server/rpc/call.h"
#include "server/rpc/runtime.h"
#include "server/rpc/unary_call.h"

namespace modelstate {

// The methods of modelstate.v1.ModelState; service.proto says what each does. They are in one file
// per family, `*_rpcs.cc`, and one for each stream.
class ModelStateService final {
 public:
  // `runtime` outlives the service, which outlives the calls.
  explicit ModelStateService(Runtime* runtime) : runtime_(*runtime) {}

  std::vector<Call::Method> methods();

 private:
  // server_info_rpcs.cc
  void GetServerInfo(UnaryCall*, const v1::GetServerInfoRequest*, v1::GetServerInfoResponse*);
  // module_rpcs.cc
  void CreateModule(UnaryCall*, const v1::CreateModuleRequest*, v1::Module*);
  void GetModule(UnaryCall*, const v1::GetModuleRequest*, v1::Module*);
  void ListModules(UnaryCall*, const v1::ListModulesRequest*, v1::ListModulesResponse*);
  void DeleteModule(UnaryCall*, const v1::DeleteModuleRequest*, v1::DeleteModuleResponse*);
  void MoveModule(UnaryCall*, const v1::MoveModuleRequest*, v1::Module*);
  void SetRequiresGrad(UnaryCall*, const v1::SetRequiresGradRequest*, v1::SetRequiresGradResponse*);
  // module_spec_rpcs.cc
  void GetModuleSpec(UnaryCall*, const v1::GetModuleSpecRequest*, v1::GetModuleSpecResponse*);
  // version_rpcs.cc
  void ListVersions(UnaryCall*, const v1::ListVersionsRequest*, v1::ListVersionsResponse*);
  // tensor_rpcs.cc
  void ListParameters(UnaryCall*, const v1::ListTensorsRequest*, v1::ListTensorsResponse*);
  void ListBuffers(UnaryCall*, const v1::ListTensorsRequest*, v1::ListTensorsResponse*);
  void GetTensor(UnaryCall*, const v1::GetTensorRequest*, v1::GetTensorResponse*);
  // optimizer_state_rpcs.cc
  void ListOptimizerState(UnaryCall*, const v1::ListTensorsRequest*, v1::ListTensorsResponse*);
  // snapshot_rpcs.cc
  void PinSnapshot(UnaryCall*, const v1::PinSnapshotRequest*, v1::Snapshot*);
  void ReleaseSnapshot(UnaryCall*, const v1::ReleaseSnapshotRequest*, v1::ReleaseSnapshotResponse*);
  // optimizer_rpcs.cc
  void ConfigureOptimizer(UnaryCall*, const v1::ConfigureOptimizerRequest*, v1::Optimizer*);
  void GetOptimizer(UnaryCall*, const v1::GetOptimizerRequest*, v1::Optimizer*);
  // checkpoint_rpcs.cc
  void ListCheckpoints(UnaryCall*, const v1::ListCheckpointsRequest*, v1::ListCheckpointsResponse*);
  void DeleteCheckpoint(UnaryCall*, const v1::DeleteCheckpointRequest*,
                        v1::DeleteCheckpointResponse*);

  // Streams to the caller: load_checkpoint.cc, save_checkpoint.cc, watch_module.cc,
  // stream_state_dict.cc.
  RefPtr<CallHandler> LoadCheckpoint(Call*);
  RefPtr<CallHandler> SaveCheckpoint(Call*);
  RefPtr<CallHandler> WatchModule(Call*);
  RefPtr<CallHandler> StreamStateDict(Call*);

  // A unary method, and one whose handler takes the messages itself.
  template <typename Request, typename Response>
  Call::Method Unary(const char* name,
                     void (ModelStateService::*answer)(UnaryCall*, const Request*, Response*));
  Call::Method Stream(const char* name, RefPtr<CallHandler> (ModelStateService::*make)(Call*));
  template <typename Push>
  Call::Method StreamFrom(const char* name);

  Runtime& runtime_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_SERVICE_H_
