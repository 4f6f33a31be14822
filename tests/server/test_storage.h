#ifndef MODELSTATE_TESTS_SERVER_TEST_STORAGE_H_
#define MODELSTATE_TESTS_SERVER_TEST_STORAGE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "server/device/device.h"
#include "server/state/tensor_storage.h"
#include "tests/server/test_environment.h"

namespace modelstate {

// The device that the suites run on.
inline std::unique_ptr<Device> MakeTestDevice(uint64_t limit_bytes) {
  absl::StatusOr<std::unique_ptr<Device>> device = MakeDevice(TestDevice(), limit_bytes);
  if (!device.ok()) ADD_FAILURE() << device.status();
  return *std::move(device);
}

// The bytes of a storage, on whatever device it is.
inline std::vector<uint8_t> BytesOf(const TensorStorage& storage) {
  std::vector<uint8_t> bytes(storage.size());
  const absl::Status status = storage.CopyToHost(0, absl::MakeSpan(bytes));
  EXPECT_TRUE(status.ok()) << status;
  return bytes;
}

inline void SetBytes(absl::Span<const uint8_t> bytes, TensorStorage& storage) {
  const absl::Status status = storage.device().CopyFromHost(bytes, storage.MutableBuffer(), 0);
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_TEST_STORAGE_H_
