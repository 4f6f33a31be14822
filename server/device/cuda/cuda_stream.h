#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_STREAM_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_STREAM_H_

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace modelstate {

class CudaEvent;

// A queue of work of one device, in order; does not wait for the default stream, which nothing here
// uses. Thread-safe. Move-only; when it goes, what was enqueued is still done.
class CudaStream {
 public:
  static absl::StatusOr<CudaStream> Create(int device) { return Create(device, false); }
  // Whose kernels come before those of others.
  static absl::StatusOr<CudaStream> CreateUrgent(int device) { return Create(device, true); }
  CudaStream(CudaStream&& other) noexcept
      : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}
  CudaStream& operator=(CudaStream&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~CudaStream();

  int device() const { return device_; }
  cudaStream_t handle() const { return handle_; }

  // Waits for all that was enqueued before; returns its errors too.
  absl::Status Synchronize() const;
  // What is enqueued from now on comes after what `event` has recorded. Does not block the host.
  absl::Status WaitFor(const CudaEvent& event) const;

 private:
  static absl::StatusOr<CudaStream> Create(int device, bool urgent);
  CudaStream(int device, cudaStream_t handle) : device_(device), handle_(handle) {}
  int device_;
  cudaStream_t handle_;
};

// A point in a stream. One that has recorded nothing counts as passed. Move-only.
class CudaEvent {
 public:
  static absl::StatusOr<CudaEvent> Create(int device) { return Create(device, false); }
  // Who waits for it sleeps, and is a little later: where many wait beside each other.
  static absl::StatusOr<CudaEvent> CreateSleeping(int device) { return Create(device, true); }
  CudaEvent(CudaEvent&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaEvent& operator=(CudaEvent&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~CudaEvent();

  cudaEvent_t handle() const { return handle_; }

  // Does not wait. REQUIRES: a stream of the event's device.
  absl::Status Record(const CudaStream& stream);
  // Waits for the stream to come past the last Record; returns the errors of what came before it.
  absl::Status Synchronize() const;
  // Whether it has; does not wait.
  absl::StatusOr<bool> Passed() const;

 private:
  static absl::StatusOr<CudaEvent> Create(int device, bool sleeping);
  explicit CudaEvent(cudaEvent_t handle) : handle_(handle) {}
  cudaEvent_t handle_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_STREAM_H_
