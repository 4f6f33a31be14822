#ifndef MODELSTATE_COMMON_BASE_SHAPE_H_
#define MODELSTATE_COMMON_BASE_SHAPE_H_

#include <cstdint>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace modelstate {

// The dimensions of a tensor, outermost first; no dimensions is a scalar of one element.
//
// Invariant: every dimension is >= 0 and the product of the dimensions that are not zero, times 16
// bytes, fits in int64. So sizes computed from a Shape never overflow, also for `[0, 2^62]`.
// Value type, thread-compatible.
class Shape {
 public:
  static constexpr size_t kMaxRank = 64;

  Shape() = default;

  // INVALID_ARGUMENT without a reason: the caller knows which tensor it is and says so.
  static absl::StatusOr<Shape> Create(absl::Span<const int64_t> dims);

  absl::Span<const int64_t> dims() const { return dims_; }
  size_t rank() const { return dims_.size(); }
  int64_t num_elements() const { return num_elements_; }

  // "[2, 3]", "[]".
  std::string ToString() const;

  friend bool operator==(const Shape& a, const Shape& b) { return a.dims_ == b.dims_; }
  friend bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }

 private:
  absl::InlinedVector<int64_t, 4> dims_;
  int64_t num_elements_ = 1;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_SHAPE_H_
