#ifndef MODELSTATE_SERVER_STATE_OPTIMIZER_STATE_H_
#define MODELSTATE_SERVER_STATE_OPTIMIZER_STATE_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "server/state/optimizer_config.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

inline constexpr size_t kMaxSlots = 4;

// One storage of a parameter's optimizer state: its name in `torch.optim.Optimizer.state_dict()`
// ("exp_avg"), or "master", the f32 copy of an f16 or bf16 parameter. Elements are F32, or F64 for
// an F64 parameter; as many as the parameter has.
struct SlotInfo {
  const char* name;
  DType dtype;
};

// The slots that a step of `algorithm` with these complete hyper-parameters keeps for a parameter.
std::vector<SlotInfo> OptimizerSlots(Algorithm algorithm, const Hyperparameters& hyperparameters,
                                     DType parameter_dtype);

// Every slot that a step of `algorithm` may keep for a parameter, also those that only an override
// of one step switches on. Their places are those of OptimizerSlots.
std::vector<SlotInfo> AllSlots(Algorithm algorithm, DType parameter_dtype);

// Optimizer state of one parameter; made by its first step (torch's lazy initialisation).
struct ParameterState {
  uint64_t step = 0;  // steps in which this parameter had a gradient
  // In the order of OptimizerSlots. Written in place only while the sole reference is here.
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
