#include "common/format/strided_copy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

template <size_t kWidth>
void CopyRow(const uint8_t* source, uint64_t stride, uint64_t count, uint8_t* out) {
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * kWidth, source + i * stride * kWidth, kWidth);
  }
}

constexpr uint64_t kGatherPiece = uint64_t{1} << 20;
constexpr uint64_t kSparseStep = 4096;

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

absl::Status StridedGather(const Shape& shape, absl::Span<const uint64_t> strides, size_t width,
                           uint64_t span_bytes, ReadPiece read, absl::Span<uint8_t> out) {
  struct GatherAxis {
    uint64_t count;
    uint64_t from;  // bytes between neighbours, in the source
    uint64_t to;    // and in `out`
    uint64_t index;
  };
  std::vector<GatherAxis> axes;
  uint64_t to = width;
  for (size_t i = shape.rank(); i-- > 0;) {
    const uint64_t count = static_cast<uint64_t>(shape.dims()[i]);
    if (count == 0) return absl::OkStatus();
    if (count > 1) axes.push_back({count, strides[i] * width, to, 0});
    to *= count;
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const GatherAxis& a, const GatherAxis& b) { return a.from > b.from; });
  uint64_t inside = 0;  // how far the axes after this one reach
  for (size_t i = axes.size(); i-- > 0;) {
    if (axes[i].from < inside) {
      return Unsupported(
          "its elements overlap in a large storage; save tensor.contiguous() in its place");
    }
    inside += axes[i].from * (axes[i].count - 1);
  }
  if (axes.empty()) axes.push_back({1, width, width, 0});
  const GatherAxis row = axes.back();
  axes.pop_back();

  // Of elements that lie far apart, little around each is read.
  std::vector<uint8_t> piece(row.from > kSparseStep ? kSparseStep : kGatherPiece);
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t from = 0;
  uint8_t* target = out.data();
  while (true) {
    uint8_t* element = target;
    uint64_t at = from;
    for (uint64_t i = 0; i < row.count; ++i, at += row.from, element += row.to) {
      if (at + width > end) {
        begin = at;
        end = std::min<uint64_t>(span_bytes, begin + piece.size());
        MS_RETURN_IF_ERROR(read(begin, absl::MakeSpan(piece).first(end - begin)));
      }
      std::memcpy(element, piece.data() + (at - begin), width);
    }
    size_t i = axes.size();
    for (; i > 0; --i) {
      GatherAxis& axis = axes[i - 1];
      from += axis.from;
      target += axis.to;
      if (++axis.index < axis.count) break;
      from -= axis.from * axis.count;
      target -= axis.to * axis.count;
      axis.index = 0;
    }
    if (i == 0) return absl::OkStatus();
  }
}

}  // namespace modelstate
