#ifndef MODELSTATE_COMMON_FORMAT_STRIDED_COPY_H_
#define MODELSTATE_COMMON_FORMAT_STRIDED_COPY_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "common/base/shape.h"

namespace modelstate {

// Gathers a view into a contiguous, row-major tensor. `source` points at the view's first element;
// strides count elements of `width` bytes (1, 2, 4 or 8). Both sides hold what the shape and the
// strides reach: the caller has checked it.
void StridedCopy(const Shape& shape, absl::Span<const uint64_t> strides, size_t width,
                 const uint8_t* source, uint8_t* out);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_STRIDED_COPY_H_
