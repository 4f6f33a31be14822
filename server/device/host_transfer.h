#ifndef MODELSTATE_SERVER_DEVICE_HOST_TRANSFER_H_
#define MODELSTATE_SERVER_DEVICE_HOST_TRANSFER_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/buffer_pool.h"

namespace modelstate {

// Brings bytes of the host into buffers of one device, of which the caller fills piece after piece
// while former pieces are on their way. Where the host sees the device's memory the pieces are that
// memory. Thread-compatible; when it goes, nothing of it is under way.
class HostWriter {
 public:
  virtual ~HostWriter() = default;

  // Memory for the bytes of `dst` from `offset` on, 1 to `max` of them, which the caller fills
  // before its next call here. `dst` must live until Finish has returned or the writer is gone.
  // After an error, which Finish tells, what is filled goes nowhere. REQUIRES: max > 0, and
  // offset + max <= dst.size().
  virtual absl::Span<uint8_t> Reserve(DeviceBuffer& dst, uint64_t offset, uint64_t max) = 0;

  // Waits until all bytes are in their buffers. The first error of all; the writer is as new then.
  virtual absl::Status Finish() = 0;

  // Copies `src` to the bytes of `dst` from `offset` on; they are there after Finish.
  void Write(absl::Span<const uint8_t> src, DeviceBuffer& dst, uint64_t offset);
};

// A part of a buffer.
struct BufferRange {
  const DeviceBuffer* buffer = nullptr;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

// Bytes of a device on their way to memory of the host. Thread-compatible; when it goes, nothing
// of it is under way.
class HostRead {
 public:
  virtual ~HostRead() = default;
  // Waits. The bytes of all ranges, one after the other, for as long as this object lives; the
  // buffers are no longer needed.
  virtual absl::StatusOr<absl::Span<const uint8_t>> Wait() = 0;
};

// Starts reads, so that the next is under way while the bytes of the last are used. Thread-safe.
class HostReader {
 public:
  virtual ~HostReader() = default;
  // The ranges' buffers must live until Wait has returned or the read is gone. A read may outlive
  // its reader. REQUIRES: at most the `block_bytes` of Device::NewReader together.
  // RESOURCE_EXHAUSTED DEVICE_MEMORY.
  virtual absl::StatusOr<std::shared_ptr<HostRead>> Start(absl::Span<const BufferRange> ranges) = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_HOST_TRANSFER_H_
