#include "server/device/device.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "server/device/cpu/cpu_device.h"

namespace modelstate {

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(absl::string_view spec,
                                                   uint64_t memory_limit_bytes) {
  if (spec == "cpu" || spec == "auto") return std::make_unique<CpuDevice>(memory_limit_bytes);
  absl::string_view number = spec;
  uint32_t index = 0;
  if (spec == "cuda" ||
      (absl::ConsumePrefix(&number, "cuda:") && absl::SimpleAtoi(number, &index))) {
    return absl::FailedPreconditionError(
        absl::StrCat("device ", spec,
                     ": support for GPUs is not built in; build with CUDA, or choose cpu or auto"));
  }
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("device \"", spec, "\" is none of cpu, cuda:N and auto"),
                   {{"field", "device"}});
}

}  // namespace modelstate
