#ifndef MODELSTATE_SERVER_BYTE_SIZE_H_
#define MODELSTATE_SERVER_BYTE_SIZE_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace modelstate {

// A number of bytes as a flag: plain digits, or digits with KiB, MiB or GiB: "4MiB".
struct ByteSize {
  uint64_t bytes = 0;
};

bool AbslParseFlag(absl::string_view text, ByteSize* size, std::string* error);
std::string AbslUnparseFlag(ByteSize size);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_BYTE_SIZE_H_
