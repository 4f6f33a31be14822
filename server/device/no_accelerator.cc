#include "absl/strings/str_cat.h"
#include "server/device/accelerator.h"

namespace modelstate {

int GpuCount() { return 0; }

absl::StatusOr<std::unique_ptr<Device>> MakeGpuDevice(uint32_t index, uint64_t, uint64_t) {
  return absl::FailedPreconditionError(
      absl::StrCat("device cuda:", index,
                   ": support for GPUs is not built in; build with CUDA, or choose cpu or auto"));
}

}  // namespace modelstate
