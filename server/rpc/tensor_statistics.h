#ifndef MODELSTATE_SERVER_RPC_TENSOR_STATISTICS_H_
#define MODELSTATE_SERVER_RPC_TENSOR_STATISTICS_H_

#include <cstdint>

#include "absl/types/span.h"
#include "common/base/dtype.h"

namespace modelstate {

// Over all elements, in double; min, max, mean and norm over the finite ones (0 when there are
// none). A complex element counts once, and its two parts are two numbers for min, max and mean.
struct TensorStatistics {
  uint64_t count = 0;
  double min = 0;
  double max = 0;
  double mean = 0;
  double norm = 0;
  uint64_t nonfinite = 0;
};

// `bytes` is whole elements of `dtype`.
TensorStatistics ComputeStatistics(absl::Span<const uint8_t> bytes, DType dtype);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_TENSOR_STATISTICS_H_
