#include "common/base/huge_buffer.h"

#include <sys/mman.h>

#include <limits>

namespace modelstate {
namespace {

constexpr size_t kPage = 4096;

size_t MappedBytes(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

void* MapHugePages(size_t bytes) {
  if (bytes > std::numeric_limits<size_t>::max() - 2 * kHugePageBytes) return nullptr;
  // Maps more than is needed and gives the ends back, so that what stays is aligned.
  const size_t mapped = MappedBytes(bytes);
  void* raw = mmap(nullptr, mapped + kHugePageBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  uint8_t* begin = static_cast<uint8_t*>(raw);
  const size_t head = -reinterpret_cast<uintptr_t>(begin) % kHugePageBytes;
  if (head > 0) munmap(begin, head);
  munmap(begin + head + mapped, kHugePageBytes - head);
  madvise(begin + head, mapped, MADV_HUGEPAGE);  // a wish: kernels without huge pages refuse it
  return begin + head;
}

void UnmapHugePages(void* memory, size_t bytes) { munmap(memory, MappedBytes(bytes)); }

}  // namespace modelstate
