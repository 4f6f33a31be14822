#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_WRITER_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_WRITER_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "server/device/cuda/staging.h"
#include "server/device/host_transfer.h"

namespace modelstate {

class CudaDevice;

// To a GPU: a few slots of pinned memory, of which one is filled while the others' copies are under
// way. The caller waits only where a slot is needed again whose copy is not done.
class CudaWriter : public HostWriter {
 public:
  // `device` outlives it.
  static absl::StatusOr<std::unique_ptr<CudaWriter>> Create(CudaDevice& device,
                                                            uint64_t total_bytes);
  ~CudaWriter() override;

  absl::Span<uint8_t> Reserve(DeviceBuffer& dst, uint64_t offset, uint64_t max) override;
  absl::Status Finish() override;

 private:
  static constexpr size_t kSlots = 6;

  struct Slot {
    DeviceBuffer memory;  // empty: not used so far
    std::unique_ptr<CudaEvent> copied;
  };

  CudaWriter(CudaDevice& device, uint64_t slot_bytes, MemoryBudget::Reservation reservation);

  absl::Status Prepare(Slot& slot);  // to be filled
  absl::Status Flush();  // enqueues what the current slot holds, and goes on to the next
  absl::Status WaitForCopies();
  absl::Status Note(absl::Status status);

  CudaDevice& device_;
  const uint64_t slot_bytes_;  // for elements; the list of its copies comes after them
  const MemoryBudget::Reservation reservation_;
  std::array<Slot, kSlots> slots_;
  size_t current_ = 0;
  bool ready_ = false;  // the current slot may be filled
  uint64_t used_ = 0;   // of it
  CopyBatch batch_;     // from it
  absl::Status status_;
  std::vector<uint8_t> nowhere_;  // where bytes go after an error
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_WRITER_H_
