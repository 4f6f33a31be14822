#ifndef MODELSTATE_COMMON_FORMAT_STRIDED_COPY_H_
#define MODELSTATE_COMMON_FORMAT_STRIDED_COPY_H_

#include <cstddef>
#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/shape.h"

namespace modelstate {

// Gathers a view into a contiguous, row-major tensor. `source` points at the view's first element;
// strides count elements of `width` bytes (1, 2, 4 or 8). Both sides hold what the shape and the
// strides reach: the caller has checked it.
void StridedCopy(const Shape& shape, absl::Span<const uint64_t> strides, size_t width,
                 const uint8_t* source, uint8_t* out);

// The same of a source that is read in pieces of at most 1 MiB, in the order in which it lies:
// `read` gives the bytes from an offset behind the view's first element on, of which there are
// `span_bytes`. CHECKPOINT_UNSUPPORTED where elements overlap so that this order goes back.
using ReadPiece = absl::FunctionRef<absl::Status(uint64_t offset, absl::Span<uint8_t> to)>;
absl::Status StridedGather(const Shape& shape, absl::Span<const uint64_t> strides, size_t width,
                           uint64_t span_bytes, ReadPiece read, absl::Span<uint8_t> out);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_STRIDED_COPY_H_
