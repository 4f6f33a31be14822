#include "server/rpc/tensor_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate {

TensorStatistics ComputeStatistics(absl::Span<const uint8_t> bytes, DType dtype) {
  constexpr size_t kBlock = 4096;
  TensorStatistics result;
  const DType part = dtype == DType::kC64 ? DType::kF32 : dtype;
  const size_t width = DTypeSize(part);
  const size_t parts = bytes.size() / width;
  result.count = parts;
  double block[kBlock];
  double sum = 0;
  double square_sum = 0;
  uint64_t finite = 0;
  double min = std::numeric_limits<double>::infinity();
  double max = -min;
  for (size_t begin = 0; begin < parts; begin += kBlock) {
    const size_t count = std::min(kBlock, parts - begin);
    CastElements(part, bytes.data() + begin * width, DType::kF64, reinterpret_cast<uint8_t*>(block),
                 static_cast<int64_t>(count));
    double block_sum = 0;
    double block_square_sum = 0;
    for (size_t i = 0; i < count; ++i) {
      const double value = block[i];
      if (!std::isfinite(value)) continue;
      ++finite;
      block_sum += value;
      block_square_sum += value * value;
      min = std::min(min, value);
      max = std::max(max, value);
    }
    sum += block_sum;
    square_sum += block_square_sum;
  }
  result.nonfinite = parts - finite;
  if (finite > 0) {
    result.min = min;
    result.max = max;
    result.mean = sum / static_cast<double>(finite);
    result.norm = std::sqrt(square_sum);
  }
  return result;
}

absl::StatusOr<absl::Span<const uint8_t>> HostBytes(const TensorStorage& storage,
                                                    std::vector<uint8_t>* scratch) {
  if (storage.device().host_visible()) return storage.HostBytes();
  scratch->resize(storage.size());
  MS_RETURN_IF_ERROR(storage.CopyToHost(0, absl::MakeSpan(*scratch)));
  return absl::MakeConstSpan(*scratch);
}

absl::Status StatisticsToProto(const TensorStorage& storage, DType dtype,
                               v1::TensorStatistics* proto) {
  std::vector<uint8_t> scratch;
  MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, HostBytes(storage, &scratch));
  const TensorStatistics statistics = ComputeStatistics(bytes, dtype);
  proto->set_count(statistics.count);
  proto->set_min(statistics.min);
  proto->set_max(statistics.max);
  proto->set_mean(statistics.mean);
  proto->set_norm(statistics.norm);
  proto->set_nonfinite(statistics.nonfinite);
  return absl::OkStatus();
}

}  // namespace modelstate
