#include "server/rpc/tensor_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/base/tensor_cast.h"

namespace modelstate {

TensorStatistics ComputeStatistics(absl::Span<const uint8_t> bytes, DType dtype) {
  constexpr size_t kBlock = 4096;
  TensorStatistics result;
  result.count = bytes.size() / DTypeSize(dtype);
  const DType part = dtype == DType::kC64 ? DType::kF32 : dtype;
  const size_t width = DTypeSize(part);
  const size_t parts = bytes.size() / width;
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

}  // namespace modelstate
