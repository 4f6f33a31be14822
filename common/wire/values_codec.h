#ifndef MODELSTATE_COMMON_WIRE_VALUES_CODEC_H_
#define MODELSTATE_COMMON_WIRE_VALUES_CODEC_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "modelstate/v1/types.pb.h"

namespace modelstate {

// Elements as a person types them -> elements as they lie in memory, in `out`.
//   into floating point  a double is rounded to nearest; a finite one that overflows is refused. An
//                        integer must be exact as a double, so beyond 2^53 not every one is.
//   into integers        whole and in range, also when typed as a double
//   into BOOL            0 or 1
//   into C64             two numbers per element
//   raw                  exactly the right number of bytes; BOOL bytes are 0 or 1
// Errors, without the tensor's name (the caller annotates): SHAPE_MISMATCH for a wrong number of
// values, NOT_REPRESENTABLE for a value, with its index; INVALID_FIELD when no values are set.
absl::Status EncodeValues(const v1::Values& values, DType dtype, int64_t num_elements,
                          std::string* out);

// The inverse, for people: integers and BOOL as ints (U64 as doubles when one exceeds 2^63-1), the
// rest as doubles, C64 as two per element. `bytes` is whole elements.
v1::Values DecodeValues(absl::Span<const uint8_t> bytes, DType dtype);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_VALUES_CODEC_H_
