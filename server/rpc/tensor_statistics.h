#ifndef MODELSTATE_SERVER_RPC_TENSOR_STATISTICS_H_
#define MODELSTATE_SERVER_RPC_TENSOR_STATISTICS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "modelstate/v1/types.pb.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// Over all elements, in double; min, max, mean and norm over the finite ones (0 when there are
// none). The two parts of a complex element are two numbers, for the count too.
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

// The same of a storage, wherever it is; reads every byte in the calling thread.
absl::Status StatisticsToProto(const TensorStorage& storage, DType dtype,
                               v1::TensorStatistics* proto);

// The bytes of `storage`; a copy in `scratch` where the host cannot see them.
absl::StatusOr<absl::Span<const uint8_t>> HostBytes(const TensorStorage& storage,
                                                    std::vector<uint8_t>* scratch);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_TENSOR_STATISTICS_H_
