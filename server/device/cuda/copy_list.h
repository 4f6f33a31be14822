#ifndef MODELSTATE_SERVER_DEVICE_CUDA_COPY_LIST_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_COPY_LIST_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace modelstate {

// Memory of the device, or pinned memory of the host; the two do not overlap.
struct CudaCopy {
  const uint8_t* from;
  uint8_t* to;
  uint64_t bytes;
};

// A list in memory that the device sees.
struct CudaCopyWork {
  const CudaCopy* copies;
  uint64_t count;  // below 2^31
};

// What one thread block copies at most, so that a large copy among small ones is shared by several.
inline constexpr uint64_t kCudaCopyBytes = uint64_t{16} << 10;

// Appends a copy to a list, in pieces; returns its new end.
inline CudaCopy* AppendCopy(const CudaCopy& copy, CudaCopy* end) {
  for (uint64_t begin = 0; begin < copy.bytes; begin += kCudaCopyBytes) {
    const uint64_t rest = copy.bytes - begin;
    *end++ = {copy.from + begin, copy.to + begin, rest < kCudaCopyBytes ? rest : kCudaCopyBytes};
  }
  return end;
}

// Enqueues all copies as one kernel, a thread block for each: for very many small ones, each of
// which would cost as much as a large one. Fastest at multiples of 16 bytes, then of 4.
cudaError_t LaunchCopyList(const CudaCopyWork& work, cudaStream_t stream);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_COPY_LIST_H_
