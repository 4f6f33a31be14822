#ifndef MODELSTATE_COMMON_BASE_BYTES_H_
#define MODELSTATE_COMMON_BASE_BYTES_H_

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace modelstate {

// The characters of a text as bytes; borrows it.
inline absl::Span<const uint8_t> AsBytes(absl::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_BYTES_H_
