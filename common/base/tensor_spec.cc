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

}  // namespace modelstate
