#include "server/device/cuda/cuda_stream.h"

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/device/cuda/cuda_status.h"

namespace modelstate {

absl::StatusOr<CudaStream> CudaStream::Create(int device, bool urgent) {
  CudaDeviceGuard guard(device);
  MS_RETURN_IF_ERROR(guard.status());
  cudaStream_t handle = nullptr;
  int least = 0;
  int greatest = 0;
  const std::string what = absl::StrCat("make a stream on cuda:", device);
  MS_RETURN_IF_ERROR(CudaStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), what));
  MS_RETURN_IF_ERROR(CudaStatus(
      cudaStreamCreateWithPriority(&handle, cudaStreamNonBlocking, urgent ? greatest : least),
      what));
  return CudaStream(device, handle);
}

CudaStream::~CudaStream() {
  if (handle_ != nullptr) (void)cudaStreamDestroy(handle_);
}

absl::Status CudaStream::Synchronize() const {
  return CudaStatus(cudaStreamSynchronize(handle_),
                    absl::StrCat("finish the work of a stream on cuda:", device_));
}

absl::Status CudaStream::WaitFor(const CudaEvent& event) const {
  return CudaStatus(cudaStreamWaitEvent(handle_, event.handle(), cudaEventWaitDefault),
                    absl::StrCat("order a stream on cuda:", device_, " after an event"));
}

absl::StatusOr<CudaEvent> CudaEvent::Create(int device, bool sleeping) {
  CudaDeviceGuard guard(device);
  MS_RETURN_IF_ERROR(guard.status());
  cudaEvent_t handle = nullptr;
  const unsigned flags = cudaEventDisableTiming | (sleeping ? cudaEventBlockingSync : 0U);
  MS_RETURN_IF_ERROR(CudaStatus(cudaEventCreateWithFlags(&handle, flags),
                                absl::StrCat("make an event on cuda:", device)));
  return CudaEvent(handle);
}

CudaEvent::~CudaEvent() {
  if (handle_ != nullptr) (void)cudaEventDestroy(handle_);
}

absl::Status CudaEvent::Record(const CudaStream& stream) {
  return CudaStatus(cudaEventRecord(handle_, stream.handle()), "record an event");
}

absl::Status CudaEvent::Synchronize() const {
  return CudaStatus(cudaEventSynchronize(handle_), "wait for an event");
}

absl::StatusOr<bool> CudaEvent::Passed() const {
  const cudaError_t error = cudaEventQuery(handle_);
  if (error == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  MS_RETURN_IF_ERROR(CudaStatus(error, "ask for an event"));
  return true;
}

}  // namespace modelstate
