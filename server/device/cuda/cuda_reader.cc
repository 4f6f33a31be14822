#include "server/device/cuda/cuda_reader.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>

#include "common/base/status.h"
#include "server/device/cuda/cuda_device.h"

namespace modelstate {
namespace {

// The one that is used, one after it, and one that gRPC has not sent yet.
constexpr uint64_t kReads = 3;
constexpr uint64_t kMinBlockBytes = uint64_t{64} << 10;

class CudaRead : public HostRead {
 public:
  CudaRead(CudaDevice& device, DeviceBuffer memory, DeviceBuffer list, uint64_t bytes,
           CudaEvent copied)
      : device_(device),
        memory_(std::move(memory)),
        list_(std::move(list)),
        bytes_(bytes),
        copied_(std::move(copied)) {}
  ~CudaRead() override {
    if (Wait().ok()) device_.staging().GiveBack(std::move(copied_));
  }

  absl::StatusOr<absl::Span<const uint8_t>> Wait() override {
    if (!result_) {
      result_ = device_.Note(copied_.Synchronize());
      // Nothing may still use memory whose owners may free it.
      if (!result_->ok()) (void)device_.down().Synchronize();
    }
    MS_RETURN_IF_ERROR(*result_);
    return absl::MakeConstSpan(memory_.data(), bytes_);
  }

 private:
  CudaDevice& device_;
  const DeviceBuffer memory_;
  const DeviceBuffer list_;
  const uint64_t bytes_;
  CudaEvent copied_;
  std::optional<absl::Status> result_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaReader>> CudaReader::Create(CudaDevice& device,
                                                               uint64_t block_bytes) {
  block_bytes = std::bit_ceil(std::max(block_bytes, kMinBlockBytes));
  MS_ASSIGN_OR_RETURN(MemoryBudget::Reservation reservation,
                      device.staging().Reserve(kReads * block_bytes));
  return std::unique_ptr<CudaReader>(new CudaReader(device, block_bytes, std::move(reservation)));
}

absl::StatusOr<std::shared_ptr<HostRead>> CudaReader::Start(absl::Span<const BufferRange> ranges) {
  absl::StatusOr<std::shared_ptr<HostRead>> read = Enqueue(ranges);
  if (!read.ok()) return device_.Note(read.status());
  return read;
}

absl::StatusOr<std::shared_ptr<HostRead>> CudaReader::Enqueue(
    absl::Span<const BufferRange> ranges) {
  MS_ASSIGN_OR_RETURN(CudaEvent copied, device_.staging().TakeEvent());
  uint64_t bytes = 0;
  for (const BufferRange& range : ranges) bytes += range.bytes;
  if (bytes > block_bytes_) return absl::InternalError("a read is larger than its reader's blocks");
  CopyBatch batch;
  const uint64_t list_bytes = ranges.size() == 1 ? 0 : CopyBatch::ListBytes(bytes, ranges.size());
  MS_ASSIGN_OR_RETURN(DeviceBuffer memory, device_.staging().Allocate(block_bytes_));
  DeviceBuffer list;
  if (list_bytes > 0) {
    MS_ASSIGN_OR_RETURN(list, device_.staging().Allocate(std::bit_ceil(list_bytes)));
  }
  uint8_t* to = memory.data();
  for (const BufferRange& range : ranges) {
    batch.Add(range.buffer->data() + range.offset, to, range.bytes, *range.buffer);
    to += range.bytes;
  }
  absl::Status status = batch.Enqueue(cudaMemcpyDeviceToHost, list.data(), device_.down());
  if (status.ok()) status = copied.Record(device_.down());
  if (!status.ok()) {
    // Nobody could wait for copies whose event is missing.
    (void)device_.down().Synchronize();
    return status;
  }
  return std::make_shared<CudaRead>(device_, std::move(memory), std::move(list), bytes,
                                    std::move(copied));
}

}  // namespace modelstate
