#ifndef MODELSTATE_SERVER_STATE_OPTIMIZER_STATE_H_
#define MODELSTATE_SERVER_STATE_OPTIMIZER_STATE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "server/rules/rule.h"
#include "server/state/optimizer.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// Place 0 is the F32 copy of a parameter that is narrower, the others are the rule's slots.
inline constexpr size_t kMasterPlace = 0;
inline constexpr size_t kMaxSlots = 1 + kMaxRuleSlots;

// One storage of a parameter's optimizer state: its place in ParameterState::slots, and its name in
// `torch.optim.Optimizer.state_dict()` ("exp_avg"), or "master". Elements are F32, or F64 for an
// F64 parameter; as many as the parameter has.
struct SlotInfo {
  size_t place;
  const char* name;
  DType dtype;
};
using SlotList = absl::InlinedVector<SlotInfo, kMaxSlots>;

// Every slot that a step of `algorithm` may keep for a parameter, also those that only some
// hyper-parameters or an override of one step switch on.
SlotList AllSlots(Algorithm algorithm, DType parameter_dtype);

// Those that a step with these complete hyper-parameters keeps.
SlotList KeptSlots(const OptimizerConfig& config, const Hyperparameters& hyperparameters,
                   DType parameter_dtype);

// Whether state of one algorithm means the same to the other: Adam and AdamW.
bool SharesState(Algorithm a, Algorithm b);

// Optimizer state of one parameter; made by its first step (torch's lazy initialisation).
struct ParameterState {
  uint64_t step = 0;  // steps in which this parameter had a gradient
  float product = 1;  // RuleInfo::product
  // By SlotInfo::place. Written in place only while the sole reference is here.
  std::array<RefPtr<TensorStorage>, kMaxSlots> slots;
};

// By schema index of the parameter; empty entries for what has not stepped, and for buffers.
// A copy shares the storages, so the next step writes fresh ones: that is how a save captures it.
// Thread-compatible; owned by the module's strand.
struct OptimizerState {
  std::vector<ParameterState> parameters;
  uint64_t nbytes() const;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_OPTIMIZER_STATE_H_
