#ifndef MODELSTATE_SERVER_DEVICE_CUDA_STAGING_RING_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_STAGING_RING_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_stream.h"

namespace modelstate {

// A few pinned chunks through which bytes go to a GPU and come from it, while the host fills or
// empties other chunks. The host waits only when it needs a chunk again whose copy is not done. Not
// thread-safe: one transfer at a time. Move-only; when it goes it waits for its own copies.
class StagingRing {
 public:
  // Writes the bytes from `offset` of the transfer on into a chunk, all of it.
  using Fill = absl::FunctionRef<absl::Status(uint64_t offset, absl::Span<uint8_t> chunk)>;
  // Reads them; the chunk is used again after the call.
  using Take = absl::FunctionRef<absl::Status(uint64_t offset, absl::Span<const uint8_t> chunk)>;

  // `stream` is borrowed. REQUIRES: both numbers positive. RESOURCE_EXHAUSTED DEVICE_MEMORY.
  static absl::StatusOr<StagingRing> Create(const CudaStream& stream, uint64_t chunk_bytes,
                                            size_t chunks);
  StagingRing(StagingRing&&) = default;
  StagingRing& operator=(StagingRing&&) = delete;
  ~StagingRing();

  // Fills chunk by chunk, in order, and enqueues their copies to `dst`. Does not wait for the last
  // of them: `dst` is complete when the stream has come past what is enqueued when this returns,
  // and must live until then. An error, of `fill` too, ends it; what was enqueued before is still
  // copied.
  absl::Status Upload(uint8_t* dst, uint64_t bytes, Fill fill);

  // Copies from `src`, after what the stream has been given before, and hands out chunk by chunk,
  // in order. When it returns, on an error too, nothing of it is under way, and `src` is no longer
  // read.
  absl::Status Download(const uint8_t* src, uint64_t bytes, Take take);

 private:
  StagingRing(const CudaStream& stream, uint64_t chunk_bytes, PinnedMemory memory,
              std::vector<CudaEvent> events)
      : stream_(&stream),
        chunk_bytes_(chunk_bytes),
        memory_(std::move(memory)),
        events_(std::move(events)) {}

  uint8_t* chunk(size_t slot) const { return memory_.data() + slot * chunk_bytes_; }
  // Enqueues a copy, and the event after it.
  absl::Status Copy(void* to, const void* from, uint64_t size, cudaMemcpyKind kind,
                    CudaEvent& event);
  absl::Status WaitForAll() const;

  const CudaStream* stream_;
  uint64_t chunk_bytes_;
  PinnedMemory memory_;
  std::vector<CudaEvent> events_;  // of each chunk: after the last copy that uses it
  size_t next_ = 0;                // the chunk that was used longest ago
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_STAGING_RING_H_
