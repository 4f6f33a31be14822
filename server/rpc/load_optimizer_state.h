#ifndef MODELSTATE_SERVER_RPC_LOAD_OPTIMIZER_STATE_H_
#define MODELSTATE_SERVER_RPC_LOAD_OPTIMIZER_STATE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "common/wire/tensor_receiver.h"
#include "modelstate/v1/step.pb.h"
#include "server/rpc/call.h"
#include "server/rpc/runtime.h"
#include "server/state/captured_state.h"
#include "server/state/optimizer_tensors.h"

namespace modelstate {

// The messages of one LoadOptimizerState call. The table is matched with the module's schema and
// the optimizer, which is the header's or the module's own; the chunks go straight into fresh
// storages, or, where the dtype is another, into temporary ones that are cast at the end. All of it
// is published when the stream has ended after its trailer.
class LoadOptimizerStatePush final : public CallHandler, private TensorDestination {
 public:
  LoadOptimizerStatePush(Runtime* runtime, Call* call) : runtime_(*runtime), call_(*call) {}

  void OnMessage(grpc::ByteBuffer* message) override;
  void OnEnd() override;

 private:
  absl::Status Begin();
  absl::Status Match(absl::Span<const ReceivedTensor> tensors);
  absl::Status Allocate(absl::Span<const ReceivedTensor> tensors);
  // Gives the memory back before the caller hears of it.
  void Fail(const absl::Status& status);
  // Casts what has another dtype, and reads the numbers. May read and write a lot of memory: runs
  // on an I/O thread.
  absl::Status CompleteItems();
  absl::Status ReadScalar(size_t index);
  void Commit();

  absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) override;
  absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) override;

  Runtime& runtime_;
  Call& call_;
  v1::OptimizerStateHeader header_;
  TensorReceiver receiver_{this};
  std::shared_ptr<ModuleInstance> module_;
  StagedOptimizerState staged_;
  OptimizerStatePlan plan_;
  // By table index, in the incoming dtype: where the elements of a slot arrive, and the one of a
  // step or product.
  std::vector<RefPtr<TensorStorage>> arrivals_;
  std::unique_ptr<HostWriter> writer_;  // to what is in arrivals_
  std::vector<std::array<uint8_t, sizeof(double)>> scalars_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_LOAD_OPTIMIZER_STATE_H_
