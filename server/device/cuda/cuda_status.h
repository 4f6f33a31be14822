#ifndef MODELSTATE_SERVER_DEVICE_CUDA_CUDA_STATUS_H_
#define MODELSTATE_SERVER_DEVICE_CUDA_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace modelstate {

// The status of a runtime call; `what` names the act: "allocate 4096 bytes on cuda:0". Memory that
// is not there is RESOURCE_EXHAUSTED DEVICE_MEMORY, a device or driver that is not there
// FAILED_PRECONDITION, all else INTERNAL with CUDA's name of it. Takes the error from the runtime's
// own memory, so that no later call returns it again; one that broke the context stays.
absl::Status CudaStatus(cudaError_t error, absl::string_view what);

// How many GPUs there are: 0 also where there is no driver, or one that is too old.
int CudaDeviceCount();

// Makes a device the current one of this thread, until the end of the scope.
class CudaDeviceGuard {
 public:
  explicit CudaDeviceGuard(int device);
  ~CudaDeviceGuard();
  CudaDeviceGuard(const CudaDeviceGuard&) = delete;
  CudaDeviceGuard& operator=(const CudaDeviceGuard&) = delete;

  const absl::Status& status() const { return status_; }

 private:
  int before_ = -1;  // -1: nothing is to be restored
  absl::Status status_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_CUDA_CUDA_STATUS_H_
