#include "server/state/optimizer_state.h"

namespace modelstate {

std::vector<SlotInfo> OptimizerSlots(Algorithm algorithm, const Hyperparameters& hyperparameters,
                                     DType parameter_dtype) {
  const DType dtype = parameter_dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  std::vector<SlotInfo> slots;
  // The master is first, so that no slot changes its place when a step switches momentum on or off.
  if (DTypeSize(parameter_dtype) < DTypeSize(DType::kF32)) {
    slots.push_back({"master", DType::kF32});
  }
  switch (algorithm) {
    case Algorithm::kSgd:
      if (hyperparameters.momentum.value_or(0) != 0) slots.push_back({"momentum_buffer", dtype});
      break;
    case Algorithm::kAdamW:
      slots.push_back({"exp_avg", dtype});
      slots.push_back({"exp_avg_sq", dtype});
      break;
  }
  return slots;
}

std::vector<SlotInfo> AllSlots(Algorithm algorithm, DType parameter_dtype) {
  Hyperparameters any;
  any.momentum = 1;
  return OptimizerSlots(algorithm, any, parameter_dtype);
}

uint64_t OptimizerState::nbytes() const {
  uint64_t bytes = 0;
  for (const ParameterState& parameter : parameters) {
    for (const RefPtr<TensorStorage>& slot : parameter.slots) {
      if (slot) bytes += slot->size();
    }
  }
  return bytes;
}

}  // namespace modelstate
