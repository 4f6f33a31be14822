#ifndef MODELSTATE_SERVER_RPC_TENSOR_SLICE_H_
#define MODELSTATE_SERVER_RPC_TENSOR_SLICE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/shape.h"

namespace modelstate {

// A part of a tensor: what basic indexing of torch and numpy selects. Value type.
class TensorSlice {
 public:
  // The whole of a tensor.
  explicit TensorSlice(const Shape& shape);

  // `text` as it stands between the brackets in Python: integers, slices `start:stop:step`, one
  // `...`, separated by commas. Negative integers count from the end, dimensions that are not
  // mentioned are whole, an integer takes its dimension away. "0", "-1, ::2", "..., 3:5".
  // INVALID_FIELD (field "slice") for what is not that, too many indices, a step that is not
  // positive; OUT_OF_RANGE RANGE_OUTSIDE_LAYOUT for an integer outside its dimension: in torch's
  // words where it has some.
  static absl::StatusOr<TensorSlice> Parse(absl::string_view text, const Shape& shape);

  // What is left of the dimensions, and how many elements that is.
  absl::Span<const int64_t> shape() const { return shape_; }
  uint64_t elements() const { return elements_; }

  // Elements [first, first + count) of the part in row-major order, out of the tensor's elements of
  // `width` bytes each. REQUIRES: first + count <= elements().
  std::vector<uint8_t> Gather(absl::Span<const uint8_t> tensor, size_t width, uint64_t first,
                              uint64_t count) const;

 private:
  TensorSlice() = default;

  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;  // in elements of the tensor, parallel to shape_
  int64_t offset_ = 0;            // of the first element
  uint64_t elements_ = 1;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_TENSOR_SLICE_H_
