#include "common/base/shape.h"

#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace modelstate {

absl::StatusOr<Shape> Shape::Create(absl::Span<const int64_t> dims) {
  if (dims.size() > kMaxRank) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a shape has ", dims.size(), " dimensions; at most ", kMaxRank, " are allowed"));
  }
  constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 16;
  int64_t nonzero_product = 1;
  bool empty = false;
  for (int64_t dim : dims) {
    if (dim < 0) {
      return absl::InvalidArgumentError(absl::StrCat("dimension ", dim, " is negative"));
    }
    if (dim == 0) {
      empty = true;
      continue;
    }
    if (dim > kMaxElements / nonzero_product) {
      return absl::InvalidArgumentError(absl::StrCat("the size of [", absl::StrJoin(dims, ", "),
                                                     "] overflows a 64-bit byte count"));
    }
    nonzero_product *= dim;
  }
  Shape shape;
  shape.dims_.assign(dims.begin(), dims.end());
  shape.num_elements_ = empty ? 0 : nonzero_product;
  return shape;
}

std::string Shape::ToString() const { return absl::StrCat("[", absl::StrJoin(dims_, ", "), "]"); }

}  // namespace modelstate
