#include "common/base/tensor_spec.h"

namespace modelstate {

const char* TensorKindName(TensorKind kind) {
  switch (kind) {
    case TensorKind::kParameter:
      return "parameter";
    case TensorKind::kBuffer:
      return "buffer";
    case TensorKind::kGradient:
      return "gradient";
    case TensorKind::kOptimizerState:
      return "optimizer state";
  }
  return "tensor";
}

std::string DisplayName(const TensorSpec& spec) {
  return spec.slot.empty() ? spec.name : spec.slot + "/" + spec.name;
}

}  // namespace modelstate
