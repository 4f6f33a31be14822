#include "server/device/cpu/host_memory_source.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <new>

namespace modelstate {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr std::align_val_t kAlignment{64};

size_t MappedBytes(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// The number in a cgroup file; no limit where there is none ("max" in version 2).
uint64_t ReadLimit(const char* path) {
  std::ifstream file(path);
  uint64_t limit = 0;
  if (file >> limit && limit > 0) return limit;
  return std::numeric_limits<uint64_t>::max();
}

}  // namespace

void* HostMemorySource::Allocate(size_t bytes) {
  if (bytes < kHugePage) return ::operator new(bytes, kAlignment, std::nothrow);
  if (bytes > std::numeric_limits<size_t>::max() - 2 * kHugePage) return nullptr;
  // Maps more than is needed and gives the ends back, so that what stays is aligned.
  const size_t mapped = MappedBytes(bytes);
  void* raw = mmap(nullptr, mapped + kHugePage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  uint8_t* begin = static_cast<uint8_t*>(raw);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head > 0) munmap(begin, head);
  munmap(begin + head + mapped, kHugePage - head);
  madvise(begin + head, mapped, MADV_HUGEPAGE);  // a wish: kernels without huge pages refuse it
  return begin + head;
}

void HostMemorySource::Free(void* ptr, size_t bytes) {
  if (bytes < kHugePage) {
    ::operator delete(ptr, kAlignment);
  } else {
    munmap(ptr, MappedBytes(bytes));
  }
}

uint64_t HostMemoryBytes() {
  const uint64_t physical =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return std::min({physical, ReadLimit("/sys/fs/cgroup/memory.max"),
                   ReadLimit("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
}

}  // namespace modelstate
