#include "server/device/cuda/staging.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/device/cuda/cuda_status.h"

namespace modelstate {
namespace {

// A copy by itself costs a few microseconds, whatever its size.
constexpr size_t kFewCopies = 4;

class PinnedSource : public MemorySource {
 public:
  void* Allocate(size_t bytes) override {
    void* data = nullptr;
    const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
    return CudaStatus(error, "allocate pinned memory").ok() ? data : nullptr;
  }
  void Free(void* ptr, size_t) override { (void)cudaFreeHost(ptr); }
};

}  // namespace

// The pool may hold more than is admitted: what gRPC has not sent yet, and other sizes.
Staging::Staging(int device, const std::string& name, uint64_t limit_bytes)
    : device_(device),
      budget_(std::make_shared<MemoryBudget>(
          Reason::kDeviceMemory,
          absl::StrCat("pinned memory of the host for transfers with ", name),
          "--staging_memory_bytes", limit_bytes)),
      pool_(BufferPool::Create(absl::StrCat("pinned memory for ", name),
                               std::make_unique<PinnedSource>(), 2 * limit_bytes)) {}

absl::StatusOr<CudaEvent> Staging::TakeEvent() {
  {
    absl::MutexLock lock(&mutex_);
    if (!events_.empty()) {
      CudaEvent event = std::move(events_.back());
      events_.pop_back();
      return event;
    }
  }
  return CudaEvent::CreateSleeping(device_);
}

void Staging::GiveBack(CudaEvent event) {
  absl::MutexLock lock(&mutex_);
  events_.push_back(std::move(event));
}

uint64_t CopyBatch::ListBytes(uint64_t bytes, uint64_t copies) {
  return (bytes / kCudaCopyBytes + copies) * sizeof(CudaCopy);
}

// Not over the end of a buffer: the next one may be of another allocation, and CUDA refuses a copy
// over two of them.
void CopyBatch::Add(const uint8_t* from, uint8_t* to, uint64_t bytes, const DeviceBuffer& buffer) {
  if (bytes == 0) return;
  if (!copies_.empty() && std::exchange(last_buffer_, buffer.data()) == buffer.data()) {
    CudaCopy& last = copies_.back();
    if (last.from + last.bytes == from && last.to + last.bytes == to) {
      last.bytes += bytes;
      return;
    }
  }
  last_buffer_ = buffer.data();
  copies_.push_back({from, to, bytes});
}

absl::Status CopyBatch::Enqueue(cudaMemcpyKind kind, uint8_t* list, const CudaStream& stream) {
  const std::vector<CudaCopy> copies = std::exchange(copies_, {});
  const char* what = kind == cudaMemcpyHostToDevice ? "copy to the device" : "copy from the device";
  if (copies.size() <= kFewCopies) {
    for (const CudaCopy& copy : copies) {
      MS_RETURN_IF_ERROR(
          CudaStatus(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, kind, stream.handle()), what));
    }
    return absl::OkStatus();
  }
  CudaDeviceGuard guard(stream.device());
  MS_RETURN_IF_ERROR(guard.status());
  auto* const pieces = reinterpret_cast<CudaCopy*>(list);
  CudaCopy* end = pieces;
  for (const CudaCopy& copy : copies) end = AppendCopy(copy, end);
  const auto count = static_cast<uint64_t>(end - pieces);
  return CudaStatus(LaunchCopyList({pieces, count}, stream.handle()), what);
}

}  // namespace modelstate
