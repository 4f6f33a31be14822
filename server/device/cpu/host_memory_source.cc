#include "server/device/cpu/host_memory_source.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <new>

#include "common/base/huge_buffer.h"

namespace modelstate {
namespace {

constexpr std::align_val_t kAlignment{64};

// The number in a cgroup file; no limit where there is none ("max" in version 2).
uint64_t ReadLimit(const char* path) {
  std::ifstream file(path);
  uint64_t limit = 0;
  if (file >> limit && limit > 0) return limit;
  return std::numeric_limits<uint64_t>::max();
}

}  // namespace

void* HostMemorySource::Allocate(size_t bytes) {
  if (bytes < kHugePageBytes) return ::operator new(bytes, kAlignment, std::nothrow);
  return MapHugePages(bytes);
}

void HostMemorySource::Free(void* ptr, size_t bytes) {
  if (bytes < kHugePageBytes) {
    ::operator delete(ptr, kAlignment);
  } else {
    UnmapHugePages(ptr, bytes);
  }
}

uint64_t HostMemoryBytes() {
  const uint64_t physical =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return std::min({physical, ReadLimit("/sys/fs/cgroup/memory.max"),
                   ReadLimit("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
}

}  // namespace modelstate
