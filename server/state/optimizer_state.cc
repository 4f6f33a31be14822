#include "server/state/optimizer_state.h"

#include "server/rules/rule_info.h"

namespace modelstate {
namespace {

// `h` null: whatever it is.
SlotList Slots(Algorithm algorithm, const Hyperparameters* h, DType parameter_dtype, bool master) {
  const DType dtype = parameter_dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  SlotList slots;
  if (master && DTypeSize(parameter_dtype) < DTypeSize(DType::kF32)) {
    slots.push_back({kMasterPlace, "master", DType::kF32});
  }
  const std::span<const SlotRule> rules = GetRule(algorithm).slots;
  for (size_t i = 0; i < rules.size(); ++i) {
    if (h != nullptr && rules[i].kept != nullptr && !rules[i].kept(*h)) continue;
    slots.push_back({kMasterPlace + 1 + i, rules[i].name, dtype});
  }
  return slots;
}

}  // namespace

SlotList AllSlots(Algorithm algorithm, DType parameter_dtype) {
  return Slots(algorithm, nullptr, parameter_dtype, /*master=*/true);
}

SlotList KeptSlots(const OptimizerConfig& config, const Hyperparameters& hyperparameters,
                   DType parameter_dtype) {
  return Slots(config.algorithm, &hyperparameters, parameter_dtype, config.master_weights);
}

bool SharesState(Algorithm a, Algorithm b) {
  const auto family = [](Algorithm algorithm) {
    return algorithm == Algorithm::kAdamW ? Algorithm::kAdam : algorithm;
  };
  return family(a) == family(b);
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
