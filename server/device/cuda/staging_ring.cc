#include "server/device/cuda/staging_ring.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"
#include "server/device/cuda/cuda_status.h"

namespace modelstate {

absl::StatusOr<StagingRing> StagingRing::Create(const CudaStream& stream, uint64_t chunk_bytes,
                                                size_t chunks) {
  MS_ASSIGN_OR_RETURN(PinnedMemory memory, PinnedMemory::Allocate(chunk_bytes * chunks));
  std::vector<CudaEvent> events;
  for (size_t i = 0; i < chunks; ++i) {
    MS_ASSIGN_OR_RETURN(CudaEvent event, CudaEvent::Create(stream.device()));
    events.push_back(std::move(event));
  }
  return StagingRing(stream, chunk_bytes, std::move(memory), std::move(events));
}

StagingRing::~StagingRing() { (void)WaitForAll(); }

absl::Status StagingRing::WaitForAll() const {
  absl::Status status;
  for (const CudaEvent& event : events_) status.Update(event.Synchronize());
  return status;
}

absl::Status StagingRing::Copy(void* to, const void* from, uint64_t size, cudaMemcpyKind kind,
                               CudaEvent& event) {
  absl::Status status =
      CudaStatus(cudaMemcpyAsync(to, from, size, kind, stream_->handle()),
                 kind == cudaMemcpyHostToDevice ? "copy to the device" : "copy from the device");
  if (status.ok()) status = event.Record(*stream_);
  // Nobody could wait for a copy whose event is missing.
  if (!status.ok()) (void)stream_->Synchronize();
  return status;
}

absl::Status StagingRing::Upload(uint8_t* dst, uint64_t bytes, Fill fill) {
  for (uint64_t offset = 0; offset < bytes; offset += chunk_bytes_) {
    const uint64_t size = std::min(chunk_bytes_, bytes - offset);
    CudaEvent& event = events_[next_];
    uint8_t* data = chunk(next_);
    next_ = (next_ + 1) % events_.size();
    MS_RETURN_IF_ERROR(event.Synchronize());
    MS_RETURN_IF_ERROR(fill(offset, absl::MakeSpan(data, size)));
    MS_RETURN_IF_ERROR(Copy(dst + offset, data, size, cudaMemcpyHostToDevice, event));
  }
  return absl::OkStatus();
}

absl::Status StagingRing::Download(const uint8_t* src, uint64_t bytes, Take take) {
  uint64_t enqueued = 0;
  const auto enqueue = [&]() -> absl::Status {
    const uint64_t size = std::min(chunk_bytes_, bytes - enqueued);
    CudaEvent& event = events_[next_];
    uint8_t* data = chunk(next_);
    next_ = (next_ + 1) % events_.size();
    MS_RETURN_IF_ERROR(event.Synchronize());  // of an upload before
    MS_RETURN_IF_ERROR(Copy(data, src + enqueued, size, cudaMemcpyDeviceToHost, event));
    enqueued += size;
    return absl::OkStatus();
  };
  const auto run = [&]() -> absl::Status {
    size_t slot = next_;
    for (size_t i = 0; i < events_.size() && enqueued < bytes; ++i) MS_RETURN_IF_ERROR(enqueue());
    for (uint64_t offset = 0; offset < bytes; offset += chunk_bytes_) {
      MS_RETURN_IF_ERROR(events_[slot].Synchronize());
      MS_RETURN_IF_ERROR(
          take(offset, absl::MakeConstSpan(chunk(slot), std::min(chunk_bytes_, bytes - offset))));
      slot = (slot + 1) % events_.size();
      if (enqueued < bytes) MS_RETURN_IF_ERROR(enqueue());
    }
    return absl::OkStatus();
  };
  absl::Status status = run();
  if (!status.ok()) (void)WaitForAll();
  return status;
}

}  // namespace modelstate
