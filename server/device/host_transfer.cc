#include "server/device/host_transfer.h"

#include <cstring>

namespace modelstate {

void HostWriter::Write(absl::Span<const uint8_t> src, DeviceBuffer& dst, uint64_t offset) {
  while (!src.empty()) {
    const absl::Span<uint8_t> to = Reserve(dst, offset, src.size());
    std::memcpy(to.data(), src.data(), to.size());
    src.remove_prefix(to.size());
    offset += to.size();
  }
}

}  // namespace modelstate
