#include "server/device/cuda/cuda_writer.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "common/base/status.h"
#include "server/device/cuda/cuda_device.h"

namespace modelstate {
namespace {

// A load by 16 threads is fastest with the largest (docs/gpu.md): with 4 MiB the slots are no
// longer in the caches when they are copied, with less each copy costs too much.
constexpr uint64_t kMinSlotBytes = uint64_t{64} << 10;
constexpr uint64_t kMaxSlotBytes = uint64_t{1} << 20;
constexpr uint64_t kNowhereBytes = uint64_t{64} << 10;
// Many small tensors fill a slot's list before its memory.
constexpr uint64_t MaxCopies(uint64_t slot_bytes) { return slot_bytes / 256; }

uint64_t SlotMemory(uint64_t slot_bytes) {
  return slot_bytes + CopyBatch::ListBytes(slot_bytes, MaxCopies(slot_bytes));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaWriter>> CudaWriter::Create(CudaDevice& device,
                                                               uint64_t total_bytes) {
  const uint64_t slot_bytes =
      std::bit_ceil(std::clamp<uint64_t>(total_bytes / kSlots, kMinSlotBytes, kMaxSlotBytes));
  MS_ASSIGN_OR_RETURN(MemoryBudget::Reservation reservation,
                      device.staging().Reserve(kSlots * SlotMemory(slot_bytes)));
  return std::unique_ptr<CudaWriter>(new CudaWriter(device, slot_bytes, std::move(reservation)));
}

CudaWriter::CudaWriter(CudaDevice& device, uint64_t slot_bytes,
                       MemoryBudget::Reservation reservation)
    : device_(device), slot_bytes_(slot_bytes), reservation_(std::move(reservation)) {}

CudaWriter::~CudaWriter() {
  if (!WaitForCopies().ok()) return;
  for (Slot& slot : slots_) {
    if (slot.copied != nullptr) device_.staging().GiveBack(std::move(*slot.copied));
  }
}

absl::Status CudaWriter::Note(absl::Status status) {
  status_.Update(device_.Note(std::move(status)));
  return status_;
}

absl::Status CudaWriter::Prepare(Slot& slot) {
  if (slot.memory.size() == 0) {
    MS_ASSIGN_OR_RETURN(CudaEvent event, device_.staging().TakeEvent());
    slot.copied = std::make_unique<CudaEvent>(std::move(event));
    MS_ASSIGN_OR_RETURN(slot.memory, device_.staging().Allocate(SlotMemory(slot_bytes_)));
  }
  return slot.copied->Synchronize();
}

absl::Status CudaWriter::Flush() {
  Slot& slot = slots_[current_];
  absl::Status status =
      batch_.Enqueue(cudaMemcpyHostToDevice, slot.memory.data() + slot_bytes_, device_.up());
  if (status.ok()) status = slot.copied->Record(device_.up());
  // Nobody could wait for copies whose event is missing.
  if (!status.ok()) (void)device_.up().Synchronize();
  current_ = (current_ + 1) % kSlots;
  ready_ = false;
  used_ = 0;
  return status;
}

absl::Span<uint8_t> CudaWriter::Reserve(DeviceBuffer& dst, uint64_t offset, uint64_t max) {
  uint8_t* const to = dst.data() + offset;
  if (status_.ok() && ready_) {
    // As the device's memory lies to a multiple of 16, so that its kernel may use them.
    used_ += (reinterpret_cast<uintptr_t>(to) - used_) % 16;
    if (used_ >= slot_bytes_ || batch_.size() == MaxCopies(slot_bytes_)) (void)Note(Flush());
  }
  if (status_.ok() && !ready_) {
    if (Note(Prepare(slots_[current_])).ok()) {
      ready_ = true;
      used_ = reinterpret_cast<uintptr_t>(to) % 16;
    }
  }
  if (!status_.ok()) {
    nowhere_.resize(kNowhereBytes);
    return absl::MakeSpan(nowhere_).subspan(0, max);
  }
  const uint64_t size = std::min(max, slot_bytes_ - used_);
  uint8_t* const from = slots_[current_].memory.data() + used_;
  batch_.Add(from, to, size, dst);
  used_ += size;
  return {from, size};
}

absl::Status CudaWriter::WaitForCopies() {
  absl::Status status;
  for (const Slot& slot : slots_) {
    if (slot.copied != nullptr) status.Update(slot.copied->Synchronize());
  }
  // After an error too: nothing may still use memory whose owners may free it.
  if (!status.ok()) (void)device_.up().Synchronize();
  return status;
}

absl::Status CudaWriter::Finish() {
  if (status_.ok() && batch_.size() > 0) (void)Note(Flush());
  (void)Note(WaitForCopies());
  batch_ = CopyBatch();
  ready_ = false;
  return std::exchange(status_, absl::OkStatus());
}

}  // namespace modelstate
