#ifndef MODELSTATE_SERVER_RPC_STEP_PUSH_H_
#define MODELSTATE_SERVER_RPC_STEP_PUSH_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/wire/tensor_receiver.h"
#include "modelstate/v1/step.pb.h"
#include "server/optim/gradient_set.h"
#include "server/optim/norm_stream.h"
#include "server/rpc/call.h"
#include "server/rpc/runtime.h"

namespace modelstate {

// The messages of one ApplyStep call.
//
// The header is looked up first: a step that was answered before is not staged again. Its payload,
// where it is sent once more, is only hashed and compared. Else the table is matched with the
// module's schema, which admits and allocates the storages that the chunks are then copied into.
// Nothing of it touches the module before the stream has ended after its trailer.
class StepPush final : public CallHandler, private TensorDestination {
 public:
  StepPush(Runtime* runtime, Call* call) : runtime_(*runtime), call_(*call) {}

  void OnMessage(grpc::ByteBuffer* message) override;
  void OnEnd() override;
  void OnGone() override;

 private:
  absl::Status Begin();
  // Gives the memory back before the caller hears of it.
  void Fail(const absl::Status& status);
  std::shared_ptr<MemoryBudget> budget() const;  // that the push is staged in
  absl::StatusOr<StepRequest> CompleteRequest();
  void Apply(StepRequest request);
  // XXH3-128 over everything that the push says: see the definition.
  std::string PayloadDigest() const;

  absl::Status OnTable(absl::Span<const ReceivedTensor> tensors) override;
  absl::Span<uint8_t> Destination(size_t index, uint64_t offset, uint64_t max) override;
  void OnBytes(size_t index, uint64_t offset, absl::Span<const uint8_t> bytes) override;

  Runtime& runtime_;
  Call& call_;
  v1::StepHeader header_;
  TensorReceiver receiver_{this};
  std::shared_ptr<ModuleInstance> module_;
  bool replay_ = false;  // answered before: hash, and drop
  bool gone_ = false;
  bool waits_ = false;  // for a round
  std::optional<GradientSet> gradients_;
  std::unique_ptr<HostWriter> writer_;  // to their device
  // By table index; null: what arrives is not kept.
  std::vector<GradientSet::Entry*> entries_;
  NormStream norm_;
  std::vector<uint8_t> scratch_;  // where bytes go that are not kept: a replay's, ignored ones
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_STEP_PUSH_H_
