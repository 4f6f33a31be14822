#include "server/device/cuda/cuda_status.h"

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {

absl::Status CudaStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  const std::string text =
      absl::StrCat("cannot ", what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation:
      return MakeError(Reason::kDeviceMemory, text);
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
      return absl::FailedPreconditionError(text);
    default:
      return absl::InternalError(text);
  }
}

int CudaDeviceCount() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

CudaDeviceGuard::CudaDeviceGuard(int device) {
  int before = -1;
  status_ = CudaStatus(cudaGetDevice(&before), "ask for the current device");
  if (!status_.ok() || before == device) return;
  status_ = CudaStatus(cudaSetDevice(device), absl::StrCat("switch to cuda:", device));
  if (status_.ok()) before_ = before;
}

CudaDeviceGuard::~CudaDeviceGuard() {
  // What fails here fails at the next call too, which says so.
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

}  // namespace modelstate
