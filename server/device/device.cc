#include "server/device/device.h"

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "server/device/accelerator.h"
#include "server/device/cpu/cpu_device.h"
#include "server/device/cpu/host_memory_source.h"

namespace modelstate {
namespace {

bool IsHost(absl::string_view spec) {
  return spec == "cpu" || spec == "auto" || absl::StartsWith(spec, "cpu:");
}

// The N of "cpu:N" and "cuda:N" is written in one way only, so that a device has one name.
bool ParseIndex(absl::string_view text, uint32_t* index) {
  return absl::SimpleAtoi(text, index) && absl::StrCat(*index) == text;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(absl::string_view spec,
                                                   uint64_t memory_limit_bytes) {
  if (spec == "cpu" || spec == "auto") return std::make_unique<CpuDevice>(memory_limit_bytes);
  absl::string_view number = spec;
  uint32_t index = 0;
  if (absl::ConsumePrefix(&number, "cpu:") && ParseIndex(number, &index) && index > 0) {
    return std::make_unique<CpuDevice>(memory_limit_bytes, std::string(spec));
  }
  number = spec;
  if (spec == "cuda" || (absl::ConsumePrefix(&number, "cuda:") && ParseIndex(number, &index))) {
    return MakeGpuDevice(index, memory_limit_bytes);
  }
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("device \"", spec, "\" is none of cpu, cpu:N (N from 1 on), cuda:N and auto"),
      {{"field", "device"}});
}

absl::StatusOr<std::vector<std::unique_ptr<Device>>> MakeDevices(absl::string_view specs,
                                                                 uint64_t memory_limit_bytes) {
  std::vector<absl::string_view> list = absl::StrSplit(specs, ',');
  uint64_t hosts = 0;
  for (absl::string_view& spec : list) {
    spec = absl::StripAsciiWhitespace(spec);
    hosts += IsHost(spec) ? 1 : 0;
  }
  std::vector<std::unique_ptr<Device>> devices;
  for (absl::string_view spec : list) {
    const uint64_t limit = memory_limit_bytes == 0 && IsHost(spec)
                               ? HostMemoryBytes() / 4 * 3 / hosts
                               : memory_limit_bytes;
    MS_ASSIGN_OR_RETURN(std::unique_ptr<Device> device, MakeDevice(spec, limit));
    for (const std::unique_ptr<Device>& other : devices) {
      if (other->name() != device->name()) continue;
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("device \"", device->name(), "\" comes twice in \"", specs,
                                    "\"; name each once"),
                       {{"field", "device"}});
    }
    devices.push_back(std::move(device));
  }
  return devices;
}

}  // namespace modelstate
