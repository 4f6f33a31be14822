#include "server/device/device.h"

#include <algorithm>
#include <cstring>
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

constexpr uint64_t kReadBytes = uint64_t{4} << 20;

bool IsHost(absl::string_view spec) { return spec == "cpu" || absl::StartsWith(spec, "cpu:"); }

// What "auto" stands for here.
absl::string_view Resolve(absl::string_view spec) {
  if (spec != "auto") return spec;
  return GpuCount() > 0 ? "cuda:0" : "cpu";
}

// The N of "cpu:N" and "cuda:N" is written in one way only, so that a device has one name.
bool ParseIndex(absl::string_view text, uint32_t* index) {
  return absl::SimpleAtoi(text, index) && absl::StrCat(*index) == text;
}

absl::Status CheckCopyRange(uint64_t offset, uint64_t bytes, uint64_t buffer_bytes) {
  if (offset <= buffer_bytes && bytes <= buffer_bytes - offset) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("copy of ", bytes, " bytes at ", offset, " leaves a buffer of ", buffer_bytes));
}

}  // namespace

absl::Status Device::CopyFromHost(absl::Span<const uint8_t> src, DeviceBuffer& dst,
                                  uint64_t offset) {
  MS_RETURN_IF_ERROR(CheckCopyRange(offset, src.size(), dst.size()));
  if (src.empty()) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<HostWriter> writer, NewWriter(src.size()));
  writer->Write(src, dst, offset);
  return writer->Finish();
}

absl::Status Device::CopyToHost(const DeviceBuffer& src, uint64_t offset, absl::Span<uint8_t> dst) {
  MS_RETURN_IF_ERROR(CheckCopyRange(offset, dst.size(), src.size()));
  if (dst.empty()) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<HostReader> reader,
                      NewReader(std::min<uint64_t>(kReadBytes, dst.size())));
  const auto start = [&](uint64_t from) {
    const BufferRange range = {&src, offset + from,
                               std::min<uint64_t>(kReadBytes, dst.size() - from)};
    return reader->Start({&range, 1});
  };
  MS_ASSIGN_OR_RETURN(std::shared_ptr<HostRead> next, start(0));
  for (uint64_t from = 0; from < dst.size();) {
    const std::shared_ptr<HostRead> read = std::move(next);
    if (dst.size() - from > kReadBytes) {
      MS_ASSIGN_OR_RETURN(next, start(from + kReadBytes));
    }
    MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, read->Wait());
    std::memcpy(dst.data() + from, bytes.data(), bytes.size());
    from += bytes.size();
  }
  return absl::OkStatus();
}

absl::Status Device::health() const {
  if (!failed_.load(std::memory_order_acquire)) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  return health_;
}

absl::Status Device::Note(absl::Status status) {
  if (status.code() != absl::StatusCode::kInternal) return status;
  std::function<void(Device&)> tell;
  {
    absl::MutexLock lock(&mutex_);
    if (!health_.ok()) return status;
    health_ = status;
    failed_.store(true, std::memory_order_release);
    tell = tell_;
  }
  if (tell) tell(*this);
  return status;
}

void Device::OnFailure(std::function<void(Device&)> tell) {
  absl::MutexLock lock(&mutex_);
  tell_ = std::move(tell);
}

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(absl::string_view spec,
                                                   uint64_t memory_limit_bytes,
                                                   uint64_t staging_limit_bytes) {
  spec = Resolve(spec);
  if (spec == "cpu") return std::make_unique<CpuDevice>(memory_limit_bytes);
  absl::string_view number = spec;
  uint32_t index = 0;
  if (absl::ConsumePrefix(&number, "cpu:") && ParseIndex(number, &index) && index > 0) {
    return std::make_unique<CpuDevice>(memory_limit_bytes, std::string(spec));
  }
  number = spec;
  if (spec == "cuda" || (absl::ConsumePrefix(&number, "cuda:") && ParseIndex(number, &index))) {
    return MakeGpuDevice(index, memory_limit_bytes, staging_limit_bytes);
  }
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("device \"", spec, "\" is none of cpu, cpu:N (N from 1 on), cuda:N and auto"),
      {{"field", "device"}});
}

absl::StatusOr<std::vector<std::unique_ptr<Device>>> MakeDevices(absl::string_view specs,
                                                                 uint64_t memory_limit_bytes,
                                                                 uint64_t staging_limit_bytes) {
  std::vector<absl::string_view> list = absl::StrSplit(specs, ',');
  uint64_t hosts = 0;
  for (absl::string_view& spec : list) {
    spec = Resolve(absl::StripAsciiWhitespace(spec));
    hosts += IsHost(spec) ? 1 : 0;
  }
  std::vector<std::unique_ptr<Device>> devices;
  for (absl::string_view spec : list) {
    const uint64_t limit = memory_limit_bytes == 0 && IsHost(spec)
                               ? HostMemoryBytes() / 4 * 3 / hosts
                               : memory_limit_bytes;
    MS_ASSIGN_OR_RETURN(std::unique_ptr<Device> device,
                        MakeDevice(spec, limit, staging_limit_bytes));
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
