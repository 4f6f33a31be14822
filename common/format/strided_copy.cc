#include "common/format/strided_copy.h"

#include <cstring>

#include "absl/container/inlined_vector.h"

namespace modelstate {
namespace {

template <size_t kWidth>
void CopyRow(const uint8_t* source, uint64_t stride, uint64_t count, uint8_t* out) {
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * kWidth, source + i * stride * kWidth, kWidth);
  }
}

struct Axis {
  uint64_t count;
  uint64_t stride;
  uint64_t index;
};

}  // namespace

void StridedCopy(const Shape& shape, absl::Span<const uint64_t> strides, size_t width,
                 const uint8_t* source, uint8_t* out) {
  if (shape.num_elements() == 0) return;
  // Neighbouring axes that step through memory as one become one.
  absl::InlinedVector<Axis, 4> axes;
  for (size_t i = 0; i < shape.rank(); ++i) {
    const uint64_t count = static_cast<uint64_t>(shape.dims()[i]);
    if (count == 1) continue;
    if (!axes.empty() && axes.back().stride == strides[i] * count) {
      axes.back() = {axes.back().count * count, strides[i], 0};
    } else {
      axes.push_back({count, strides[i], 0});
    }
  }
  if (axes.empty()) axes.push_back({1, 1, 0});
  const Axis row = axes.back();
  axes.pop_back();

  while (true) {
    const uint8_t* from = source;
    for (const Axis& axis : axes) from += axis.index * axis.stride * width;
    if (row.stride == 1) {
      std::memcpy(out, from, row.count * width);
    } else if (width == 1) {
      CopyRow<1>(from, row.stride, row.count, out);
    } else if (width == 2) {
      CopyRow<2>(from, row.stride, row.count, out);
    } else if (width == 4) {
      CopyRow<4>(from, row.stride, row.count, out);
    } else {
      CopyRow<8>(from, row.stride, row.count, out);
    }
    out += row.count * width;
    size_t i = axes.size();
    while (i > 0 && ++axes[i - 1].index == axes[i - 1].count) axes[--i].index = 0;
    if (i == 0) return;
  }
}

}  // namespace modelstate
