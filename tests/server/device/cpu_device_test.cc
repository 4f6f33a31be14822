#include "server/device/cpu/cpu_device.h"

#include <gmock/gmock.h>

#include "common/base/status.h"
#include "server/device/cpu/host_memory_source.h"

namespace modelstate {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr size_t kHugePage = size_t{2} << 20;

TEST(HostMemorySource, AlignsSmallTo64BytesAndLargeToHugePages) {
  HostMemorySource source;
  for (size_t bytes : {size_t{1}, size_t{100}, kHugePage - 1, kHugePage, 3 * kHugePage + 5}) {
    void* ptr = source.Allocate(bytes);
    ASSERT_NE(ptr, nullptr);
    const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(ptr) % alignment, 0u) << bytes;
    static_cast<uint8_t*>(ptr)[0] = 1;
    static_cast<uint8_t*>(ptr)[bytes - 1] = 1;
    source.Free(ptr, bytes);
  }
  EXPECT_EQ(source.Allocate(~size_t{0}), nullptr);
}

TEST(MakeDevice, CpuTakesThreeQuartersOfTheMemoryByDefault) {
  for (const char* spec : {"cpu", "auto"}) {
    absl::StatusOr<std::unique_ptr<Device>> device = MakeDevice(spec, 0);
    ASSERT_TRUE(device.ok()) << device.status();
    EXPECT_EQ((*device)->name(), "cpu");
    EXPECT_TRUE((*device)->host_visible());
    EXPECT_EQ((*device)->pool()->usage().limit_bytes, HostMemoryBytes() / 4 * 3);
  }
  EXPECT_EQ((*MakeDevice("cpu", 77))->pool()->usage().limit_bytes, 77u);
}

TEST(MakeDevice, GpuThatIsNotThereIsNeverASilentCpu) {
  const absl::Status error = MakeDevice("cuda:4096", 0).status();
  EXPECT_EQ(error.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(error.message()), AnyOf(HasSubstr("not built in"), HasSubstr("driver")));
  EXPECT_EQ(MakeDevice("cuda:4294967295", 0).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(MakeDevices, PoolsOfHostMemoryHaveNamesAndLimitsOfTheirOwn) {
  auto devices = MakeDevices("cpu,cpu:1, cpu:12", 1000);
  ASSERT_TRUE(devices.ok()) << devices.status();
  ASSERT_EQ(devices->size(), 3u);
  EXPECT_EQ((*devices)[0]->name(), "cpu");
  EXPECT_EQ((*devices)[1]->name(), "cpu:1");
  EXPECT_EQ((*devices)[2]->name(), "cpu:12");
  DeviceBuffer all = *(*devices)[0]->pool()->Allocate(1000);
  EXPECT_THAT(std::string((*devices)[0]->pool()->Allocate(8).status().message()),
              HasSubstr("device cpu "));
  DeviceBuffer other = *(*devices)[1]->pool()->Allocate(600);
  EXPECT_THAT(std::string((*devices)[1]->pool()->Allocate(600).status().message()),
              HasSubstr("device cpu:1 "));
}

TEST(MakeDevices, PoolsOfHostMemoryShareItByDefault) {
  auto devices = MakeDevices("cpu,cpu:1", 0);
  ASSERT_TRUE(devices.ok()) << devices.status();
  for (const auto& device : *devices) {
    EXPECT_EQ(device->pool()->usage().limit_bytes, HostMemoryBytes() / 4 * 3 / 2);
  }
}

TEST(MakeDevices, RefusesNoneTwiceAndUnknown) {
  for (const char* specs : {"", "cpu,", "cpu,cpu", "auto,cpu", "cpu:0", "cpu:01", "cpu:-1",
                            "cpu:1,cpu:1", "cpu:4294967296", "cpu,tpu"}) {
    EXPECT_EQ(GetReason(MakeDevices(specs, 0).status()), Reason::kInvalidField) << specs;
  }
}

TEST(MakeDevice, RefusesOtherNames) {
  for (const char* spec : {"", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"}) {
    EXPECT_EQ(GetReason(MakeDevice(spec, 0).status()), Reason::kInvalidField) << spec;
  }
}

}  // namespace
}  // namespace modelstate
