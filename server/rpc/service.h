#ifndef MODELSTATE_SERVER_RPC_SERVICE_H_
#define MODELSTATE_SERVER_RPC_SERVICE_H_

#include <vector>

#include "modelstate/v1/service.grpc.pb.h"
#include "server/rpc/push_call.h"
#include "server/rpc/runtime.h"

namespace modelstate {

namespace service_internal {

using Push = v1::ModelState::WithRawMethod_ApplyStep<v1::ModelState::WithRawMethod_LoadStateDict<
    v1::ModelState::WithRawMethod_LoadOptimizerState<v1::ModelState::Service>>>;
using Streams = v1::ModelState::WithRawCallbackMethod_StreamStateDict<
    v1::ModelState::WithCallbackMethod_LoadCheckpoint<
        v1::ModelState::WithCallbackMethod_SaveCheckpoint<
            v1::ModelState::WithRawCallbackMethod_WatchModule<Push>>>>;
using Versions = v1::ModelState::WithCallbackMethod_ListVersions<
    v1::ModelState::WithCallbackMethod_GetModuleSpec<Streams>>;
using Modules = v1::ModelState::WithCallbackMethod_GetServerInfo<
    v1::ModelState::WithCallbackMethod_CreateModule<
        v1::ModelState::WithCallbackMethod_GetModule<v1::ModelState::WithCallbackMethod_ListModules<
            v1::ModelState::WithCallbackMethod_DeleteModule<
                v1::ModelState::WithCallbackMethod_MoveModule<
                    v1::ModelState::WithCallbackMethod_SetRequiresGrad<Versions>>>>>>>;
using Tensors = v1::ModelState::WithCallbackMethod_ListParameters<
    v1::ModelState::WithCallbackMethod_ListBuffers<
        v1::ModelState::WithCallbackMethod_ListOptimizerState<
            v1::ModelState::WithCallbackMethod_GetTensor<
                v1::ModelState::WithCallbackMethod_PinSnapshot<
                    v1::ModelState::WithCallbackMethod_ReleaseSnapshot<Modules>>>>>>;
using All = v1::ModelState::WithCallbackMethod_ConfigureOptimizer<
    v1::ModelState::WithCallbackMethod_GetOptimizer<
        v1::ModelState::WithCallbackMethod_ListCheckpoints<
            v1::ModelState::WithCallbackMethod_DeleteCheckpoint<Tensors>>>>;

}  // namespace service_internal

// The service modelstate.v1.ModelState; service.proto says what each method does. Unary calls and
// streams to the client use gRPC's callback API, streams from the client its completion queues
// (push_methods()). The methods are in one file per family, `*_rpcs.cc` and one for each stream.
class ModelStateService final : public service_internal::All {
 public:
  // `runtime` outlives the service.
  explicit ModelStateService(Runtime* runtime) : runtime_(*runtime) {}

  // ApplyStep, LoadStateDict and LoadOptimizerState, for PushQueues.
  std::vector<PushCall::Method> push_methods();

 private:
  template <typename T>
  using Writer = grpc::ServerWriteReactor<T>;
  using Unary = grpc::ServerUnaryReactor;
  using Context = grpc::CallbackServerContext;

  // server_info_rpcs.cc
  Unary* GetServerInfo(Context*, const v1::GetServerInfoRequest*,
                       v1::GetServerInfoResponse*) override;
  // module_rpcs.cc
  Unary* CreateModule(Context*, const v1::CreateModuleRequest*, v1::Module*) override;
  Unary* GetModule(Context*, const v1::GetModuleRequest*, v1::Module*) override;
  Unary* ListModules(Context*, const v1::ListModulesRequest*, v1::ListModulesResponse*) override;
  Unary* DeleteModule(Context*, const v1::DeleteModuleRequest*, v1::DeleteModuleResponse*) override;
  Unary* MoveModule(Context*, const v1::MoveModuleRequest*, v1::Module*) override;
  Unary* SetRequiresGrad(Context*, const v1::SetRequiresGradRequest*,
                         v1::SetRequiresGradResponse*) override;
  // module_spec_rpcs.cc
  Unary* GetModuleSpec(Context*, const v1::GetModuleSpecRequest*,
                       v1::GetModuleSpecResponse*) override;
  // version_rpcs.cc
  Unary* ListVersions(Context*, const v1::ListVersionsRequest*, v1::ListVersionsResponse*) override;
  // tensor_rpcs.cc
  Unary* ListParameters(Context*, const v1::ListTensorsRequest*, v1::ListTensorsResponse*) override;
  Unary* ListBuffers(Context*, const v1::ListTensorsRequest*, v1::ListTensorsResponse*) override;
  Unary* GetTensor(Context*, const v1::GetTensorRequest*, v1::GetTensorResponse*) override;
  // optimizer_state_rpcs.cc
  Unary* ListOptimizerState(Context*, const v1::ListTensorsRequest*,
                            v1::ListTensorsResponse*) override;
  // snapshot_rpcs.cc
  Unary* PinSnapshot(Context*, const v1::PinSnapshotRequest*, v1::Snapshot*) override;
  Unary* ReleaseSnapshot(Context*, const v1::ReleaseSnapshotRequest*,
                         v1::ReleaseSnapshotResponse*) override;
  // optimizer_rpcs.cc
  Unary* ConfigureOptimizer(Context*, const v1::ConfigureOptimizerRequest*,
                            v1::Optimizer*) override;
  Unary* GetOptimizer(Context*, const v1::GetOptimizerRequest*, v1::Optimizer*) override;
  // checkpoint_rpcs.cc
  Unary* ListCheckpoints(Context*, const v1::ListCheckpointsRequest*,
                         v1::ListCheckpointsResponse*) override;
  Unary* DeleteCheckpoint(Context*, const v1::DeleteCheckpointRequest*,
                          v1::DeleteCheckpointResponse*) override;
  // load_checkpoint.cc, save_checkpoint.cc, watch_module.cc, stream_state_dict.cc
  Writer<v1::LoadCheckpointResponse>* LoadCheckpoint(Context*,
                                                     const v1::LoadCheckpointRequest*) override;
  Writer<v1::SaveCheckpointResponse>* SaveCheckpoint(Context*,
                                                     const v1::SaveCheckpointRequest*) override;
  Writer<grpc::ByteBuffer>* WatchModule(Context*, const grpc::ByteBuffer*) override;
  Writer<grpc::ByteBuffer>* StreamStateDict(Context*, const grpc::ByteBuffer*) override;

  Runtime& runtime_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_SERVICE_H_
