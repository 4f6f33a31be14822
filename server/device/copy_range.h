#ifndef MODELSTATE_SERVER_DEVICE_COPY_RANGE_H_
#define MODELSTATE_SERVER_DEVICE_COPY_RANGE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace modelstate {

// INTERNAL unless `[offset, offset + count)` lies inside a buffer of `size` bytes.
inline absl::Status CheckCopyRange(uint64_t offset, uint64_t count, uint64_t size) {
  if (offset <= size && count <= size - offset) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("a copy of ", count, " bytes at offset ", offset,
                                          " leaves its buffer of ", size, " bytes"));
}

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_COPY_RANGE_H_
