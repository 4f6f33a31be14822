#ifndef MODELSTATE_SERVER_DEVICE_CPU_HOST_MEMORY_SOURCE_H_
#define MODELSTATE_SERVER_DEVICE_CPU_HOST_MEMORY_SOURCE_H_

#include <cstdint>

#include "server/device/buffer_pool.h"

namespace modelstate {

// Host memory: from 2 MiB on by mmap, aligned to 2 MiB and with huge pages asked for; below that
// from the heap, aligned to 64 bytes. Thread-safe.
class HostMemorySource : public MemorySource {
 public:
  void* Allocate(size_t bytes) override;
  void Free(void* ptr, size_t bytes) override;
};

// Bytes of memory that this process may use: of the machine, or less where a cgroup says so.
uint64_t HostMemoryBytes();

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CPU_HOST_MEMORY_SOURCE_H_
