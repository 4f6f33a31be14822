#ifndef MODELSTATE_COMMON_BASE_TENSOR_CAST_H_
#define MODELSTATE_COMMON_BASE_TENSOR_CAST_H_

#include <cstdint>

#include "common/base/dtype.h"

namespace modelstate {

// Casts `count` elements as `tensor.to(dtype)` does on an x86 host, with the cases that C++ leaves
// undefined defined the same everywhere:
//   floating to floating   to nearest, ties to even, by way of float for the types below it;
//                          overflow as float_cast.h says
//   floating to integer    truncates; to I64 and I32, NaN and what does not fit are the minimum; to
//                          I16 and I8 by way of I32, to U8, U16 and U32 by way of I64, wrapping
//   floating to U64        truncates modulo 2^64 above -2^63; below that and NaN are 2^63; 2^64 and
//                          more is 0
//   integer to integer     wraps
//   anything to BOOL       nonzero, so NaN is true
//   C64 to real            drops the imaginary part; to BOOL, either part counts
//   real to C64            the imaginary part is 0
//
// The ranges may not overlap unless they are equal and the destination is not wider. No alignment
// is needed.
void CastElements(DType from, const uint8_t* src, DType to, uint8_t* dst, int64_t count);

// The casts of a single value to an integer, as above.
int64_t DoubleToInt64(double value);
int32_t DoubleToInt32(double value);
uint64_t DoubleToUint64(double value);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_TENSOR_CAST_H_
