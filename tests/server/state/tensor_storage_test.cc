#include "server/state/tensor_storage.h"

#include <gmock/gmock.h>

#include <cstring>
#include <vector>

#include "common/base/digest.h"
#include "common/base/status.h"
#include "server/device/cpu/cpu_device.h"

namespace modelstate {
namespace {

// Host memory that pretends not to be: reads go through CopyToHost.
class FarDevice : public CpuDevice {
 public:
  using CpuDevice::CpuDevice;
  bool host_visible() const override { return false; }
};

TEST(TensorStorage, GivesItsMemoryBackWithTheLastReference) {
  CpuDevice device(1000);
  const std::vector<uint8_t> bytes = {1, 2, 3};
  RefPtr<TensorStorage> storage = *TensorStorage::FromHost(device, bytes);
  StorageRef reader = storage;
  EXPECT_FALSE(storage->IsSoleReference());
  storage = nullptr;
  EXPECT_THAT(reader->HostBytes(), ::testing::ElementsAre(1, 2, 3));
  EXPECT_EQ(device.pool()->usage().used_bytes, 3u);
  reader = nullptr;
  EXPECT_EQ(device.pool()->usage().used_bytes, 0u);
  EXPECT_EQ(GetReason(TensorStorage::Allocate(device, 1001).status()), Reason::kDeviceMemory);
}

TEST(TensorStorage, DroppingManyReferencesKeepsWhatOthersHold) {
  CpuDevice device(1 << 20);
  std::vector<StorageRef> version;
  for (uint8_t i = 0; i < 255; ++i) {
    version.push_back(*TensorStorage::FromHost(device, std::vector<uint8_t>(100, i)));
  }
  for (uint8_t i = 0; i < 255; ++i) {
    version.push_back(*TensorStorage::FromHost(device, std::vector<uint8_t>(50, i)));
  }
  version.push_back(version[7]);  // tied
  version.push_back(nullptr);
  const StorageRef reader = version[100];
  TensorStorage::DropAll(std::move(version));
  EXPECT_EQ(device.pool()->usage().used_bytes, 100u);
  EXPECT_THAT(reader->HostBytes(), ::testing::Each(100));
}

TEST(TensorStorage, DigestIsKeptUntilABufferIsTakenForWriting) {
  CpuDevice near(uint64_t{1} << 30);
  FarDevice far(uint64_t{1} << 30);
  std::vector<uint8_t> bytes((size_t{5} << 19) + 3);  // more than two pieces
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 7 >> 3);
  for (Device* device : {static_cast<Device*>(&near), static_cast<Device*>(&far)}) {
    RefPtr<TensorStorage> storage = *TensorStorage::FromHost(*device, bytes);
    EXPECT_EQ(storage->CachedDigest(), std::nullopt);
    EXPECT_EQ(*storage->Digest(), Xxh3(bytes));
    EXPECT_EQ(storage->CachedDigest(), std::optional<uint64_t>(Xxh3(bytes)));
    storage->MutableBuffer();
    EXPECT_EQ(storage->CachedDigest(), std::nullopt);
    storage->CacheDigest(5);
    EXPECT_EQ(*storage->Digest(), 5u);
  }
}

TEST(TensorStorage, MayBeEmpty) {
  CpuDevice device(0);
  RefPtr<TensorStorage> storage = *TensorStorage::FromHost(device, {});
  EXPECT_EQ(storage->size(), 0u);
  EXPECT_EQ(*storage->Digest(), Xxh3({}));
}

}  // namespace
}  // namespace modelstate
