#ifndef MODELSTATE_SERVER_RPC_LOAD_PUSH_H_
#define MODELSTATE_SERVER_RPC_LOAD_PUSH_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "common/wire/tensor_receiver.h"
#include "modelstate/v1/state.pb.h"
#include "server/rpc/call.h"
#include "server/rpc/initial_values.h"
#include "server/rpc/runtime.h"
#include "server/state/load_plan.h"

namespace modelstate {

// The messages of one LoadStateDict call. The table makes a LoadPlan against the module's schema;
// the chunks go straight into fresh storages, or, where the dtype changes, into temporary ones of
// the incoming dtype that are cast at the end. Tensors that the plan leaves out are dropped as they
// come, and those that have an initializer are filled at the end. The load is committed when the
// stream has ended after its trailer. A dry run is answered when the table is complete; what comes
// after that is not looked at.
class LoadPush final : public CallHandler, private TensorDestination {
 public:
  LoadPush(Runtime* runtime, Call* call) : runtime_(*runtime), call_(*call) {}

  void OnMessage(grpc::ByteBuffer* message) override;
  void OnEnd() override;

 private:
  absl::Status Begin();
  absl::Status PlanFills(const LoadPlan& plan, absl::Span<const ReceivedTensor> tensors);
  // Gives the memory back before the caller hears of it.
  void Fail(const absl::Status& status);
  // Casts what has another dtype, and copies what two names share. Reads and writes a lot of
  // memory: runs on an I/O thread.
  absl::Status CompleteItems();
  void Commit();
  void AnswerDryRun();

  absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) override;
  absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) override;

  Runtime& runtime_;
  Call& call_;
  v1::LoadHeader header_;
  TensorReceiver receiver_{this};
  std::shared_ptr<ModuleInstance> module_;
  LoadOptions options_;
  std::optional<LoadPlan> dry_plan_;  // of a dry run
  std::optional<StagedLoad> staged_;
  std::vector<RefPtr<TensorStorage>> targets_;  // by item
  // By item, of those whose source has an initializer in place of elements.
  struct Fill {
    TensorSpec spec;
    InitialValue value;
  };
  absl::flat_hash_map<size_t, Fill> fills_;
  // By table index: where the elements arrive, of the incoming dtype; null where they are dropped.
  std::vector<RefPtr<TensorStorage>> arrivals_;
  std::unique_ptr<HostWriter> writer_;  // to what is in arrivals_
  std::vector<uint32_t> holder_;        // by table index: the entry that has its bytes
  std::vector<uint8_t> scratch_;        // where dropped bytes go
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_LOAD_PUSH_H_
