#ifndef MODELSTATE_COMMON_BASE_RANDOM_H_
#define MODELSTATE_COMMON_BASE_RANDOM_H_

#include <sys/random.h>

#include <cstdint>
#include <cstdlib>

namespace modelstate {

// 64 bits from the kernel's generator: not to be guessed, and never the same after a restart.
// Thread-safe.
inline uint64_t RandomUint64() {
  uint64_t value = 0;
  // Up to 256 bytes are never cut short; the call exists since Linux 3.17.
  if (getrandom(&value, sizeof(value), 0) != static_cast<ssize_t>(sizeof(value))) std::abort();
  return value;
}

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_RANDOM_H_
