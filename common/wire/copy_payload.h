#ifndef MODELSTATE_COMMON_WIRE_COPY_PAYLOAD_H_
#define MODELSTATE_COMMON_WIRE_COPY_PAYLOAD_H_

#include <cstddef>
#include <cstdint>

namespace modelstate {

// Copies payload from where it was received, which is in the cache, to its place in memory, past
// the cache: a plain copy would read the destination first, and push out what comes next.
// The bytes are visible to whoever is told of them afterwards.
void CopyPayload(uint8_t* destination, const uint8_t* source, size_t size);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_COPY_PAYLOAD_H_
