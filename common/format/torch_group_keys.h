#ifndef MODELSTATE_COMMON_FORMAT_TORCH_GROUP_KEYS_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_GROUP_KEYS_H_

#include <cstdint>

#include "absl/types/span.h"
#include "common/base/hyperparameters.h"

namespace modelstate {

// A key of a group of torch.optim, in the order in which torch 2.15 writes them. Internal to the
// folder.
struct TorchGroupKey {
  enum class Value : uint8_t {
    kHyperparameter,
    kBetas,  // the tuple (beta1, beta2)
    // Of the implementation, not of the mathematics: what torch has by default.
    kNone,
    kFalse,
    kTrue,
  };
  const char* name;
  Value value = Value::kHyperparameter;
};

// Empty for an algorithm that is none.
absl::Span<const TorchGroupKey> TorchGroupKeys(Algorithm algorithm);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_GROUP_KEYS_H_
