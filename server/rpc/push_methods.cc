#include "server/rpc/load_optimizer_state.h"
#include "server/rpc/load_push.h"
#include "server/rpc/service.h"
#include "server/rpc/step_push.h"

namespace modelstate {

std::vector<PushCall::Method> ModelStateService::push_methods() {
  PushCall::Method apply_step;
  apply_step.request = [this](grpc::ServerContext* context, PushCall::Reader* reader,
                              grpc::ServerCompletionQueue* queue,
                              void* tag) { RequestApplyStep(context, reader, queue, queue, tag); };
  apply_step.make_session = [this](PushCall* call) {
    return std::make_unique<StepPush>(&runtime_, call);
  };
  PushCall::Method load_state_dict;
  load_state_dict.request = [this](grpc::ServerContext* context, PushCall::Reader* reader,
                                   grpc::ServerCompletionQueue* queue, void* tag) {
    RequestLoadStateDict(context, reader, queue, queue, tag);
  };
  load_state_dict.make_session = [this](PushCall* call) {
    return std::make_unique<LoadPush>(&runtime_, call);
  };
  PushCall::Method load_optimizer_state;
  load_optimizer_state.request = [this](grpc::ServerContext* context, PushCall::Reader* reader,
                                        grpc::ServerCompletionQueue* queue, void* tag) {
    RequestLoadOptimizerState(context, reader, queue, queue, tag);
  };
  load_optimizer_state.make_session = [this](PushCall* call) {
    return std::make_unique<LoadOptimizerStatePush>(&runtime_, call);
  };
  return {apply_step, load_state_dict, load_optimizer_state};
}

}  // namespace modelstate
