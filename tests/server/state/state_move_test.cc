#include "server/state/state_move.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "server/device/cpu/cpu_device.h"

namespace modelstate {
namespace {

// Memory that the host must not touch: what is behind an address is scrambled, so that whoever
// reads or writes it there gets other bytes.
class HiddenDevice final : public Device {
 public:
  explicit HiddenDevice(uint64_t limit_bytes)
      : Device(BufferPool::Create("hidden", MakeSource(), limit_bytes)) {}

  const std::string& name() const override { return name_; }
  bool host_visible() const override { return false; }
  absl::StatusOr<std::unique_ptr<HostWriter>> NewWriter(uint64_t) override {
    return std::make_unique<Writer>(*this);
  }
  absl::StatusOr<std::unique_ptr<HostReader>> NewReader(uint64_t) override {
    return std::make_unique<Reader>(*this);
  }
  absl::Status FillZero(DeviceBuffer& dst) override {
    std::memset(dst.data(), 0x5A, dst.size());
    return absl::OkStatus();
  }

  void FailAt(int copy) {
    copies_ = 0;
    fail_at_ = copy;
  }

 private:
  absl::Status Count() {
    return ++copies_ == fail_at_ ? absl::InternalError("the device failed") : absl::OkStatus();
  }
  static std::vector<uint8_t> Scrambled(absl::Span<const uint8_t> bytes) {
    std::vector<uint8_t> out(bytes.begin(), bytes.end());
    for (uint8_t& byte : out) byte ^= 0x5A;
    return out;
  }

  class Writer : public HostWriter {
   public:
    explicit Writer(HiddenDevice& device) : device_(device) {}
    absl::Span<uint8_t> Reserve(DeviceBuffer& dst, uint64_t offset, uint64_t max) override {
      pieces_.push_back({dst.data() + offset, std::vector<uint8_t>(max)});
      return absl::MakeSpan(pieces_.back().bytes);
    }
    absl::Status Finish() override {
      for (const Piece& piece : std::exchange(pieces_, {})) {
        const std::vector<uint8_t> bytes = Scrambled(piece.bytes);
        std::memcpy(piece.to, bytes.data(), bytes.size());
      }
      return device_.Count();
    }

   private:
    struct Piece {
      uint8_t* to;
      std::vector<uint8_t> bytes;
    };
    HiddenDevice& device_;
    std::vector<Piece> pieces_;
  };

  class Read : public HostRead {
   public:
    explicit Read(absl::StatusOr<std::vector<uint8_t>> bytes) : bytes_(std::move(bytes)) {}
    absl::StatusOr<absl::Span<const uint8_t>> Wait() override {
      if (!bytes_.ok()) return bytes_.status();
      return absl::MakeConstSpan(*bytes_);
    }

   private:
    const absl::StatusOr<std::vector<uint8_t>> bytes_;
  };

  class Reader : public HostReader {
   public:
    explicit Reader(HiddenDevice& device) : device_(device) {}
    absl::StatusOr<std::shared_ptr<HostRead>> Start(absl::Span<const BufferRange> ranges) override {
      std::vector<uint8_t> all;
      for (const BufferRange& range : ranges) {
        const std::vector<uint8_t> bytes =
            Scrambled({range.buffer->data() + range.offset, range.bytes});
        all.insert(all.end(), bytes.begin(), bytes.end());
      }
      const absl::Status status = device_.Count();
      if (!status.ok()) return std::make_shared<Read>(status);
      return std::make_shared<Read>(std::move(all));
    }

   private:
    HiddenDevice& device_;
  };

  class HeapSource final : public MemorySource {
   public:
    void* Allocate(size_t bytes) override { return ::operator new(bytes); }
    void Free(void* ptr, size_t) override { ::operator delete(ptr); }
  };
  static std::unique_ptr<MemorySource> MakeSource() { return std::make_unique<HeapSource>(); }

  const std::string name_ = "hidden";
  std::atomic<int> copies_{0};
  int fail_at_ = 0;
};

std::vector<uint8_t> ReadBack(const TensorStorage& storage) {
  std::vector<uint8_t> bytes(storage.size());
  EXPECT_TRUE(storage.CopyToHost(0, absl::MakeSpan(bytes)).ok());
  return bytes;
}

class ConvertStorageTest : public testing::Test {
 protected:
  // More than two pieces of every conversion, and a rest.
  static constexpr uint64_t kCount = 150'001;

  static std::vector<uint8_t> RandomBytes(size_t size) {
    std::mt19937_64 random(7);
    std::vector<uint8_t> bytes(size);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    return bytes;
  }

  CpuDevice cpu_{uint64_t{64} << 20};
  CpuDevice other_{uint64_t{64} << 20, "cpu:1"};
  HiddenDevice hidden_{uint64_t{64} << 20};
  ComputePool compute_{3};
};

TEST_F(ConvertStorageTest, CopiesAndCastsBetweenAllKindsOfDevices) {
  const std::pair<DType, DType> casts[] = {{DType::kF32, DType::kF32},
                                           {DType::kF32, DType::kBF16},
                                           {DType::kF16, DType::kF64},
                                           {DType::kI64, DType::kI64}};
  for (const auto& [from, to] : casts) {
    const std::vector<uint8_t> source = RandomBytes(kCount * DTypeSize(from));
    std::vector<uint8_t> expected(kCount * DTypeSize(to));
    if (from == to) {
      expected = source;
    } else {
      CastElements(from, source.data(), to, expected.data(), kCount);
    }
    for (Device* at : std::initializer_list<Device*>{&cpu_, &hidden_}) {
      const StorageRef storage = *TensorStorage::FromHost(*at, source);
      for (Device* target : std::initializer_list<Device*>{&cpu_, &other_, &hidden_}) {
        for (ComputePool* compute : {&compute_, static_cast<ComputePool*>(nullptr)}) {
          SCOPED_TRACE(testing::Message() << DTypeName(from) << " on " << at->name() << " to "
                                          << DTypeName(to) << " on " << target->name());
          auto converted = ConvertStorage(storage, from, to, kCount, *target, compute);
          ASSERT_TRUE(converted.ok()) << converted.status();
          EXPECT_EQ(&(*converted)->device(), target);
          EXPECT_TRUE((*converted)->IsSoleReference());
          EXPECT_TRUE(ReadBack(**converted) == expected);
        }
      }
    }
  }
}

TEST_F(ConvertStorageTest, ACopyKeepsTheDigestACastDoesNot) {
  const StorageRef storage = *TensorStorage::FromHost(cpu_, RandomBytes(4000));
  EXPECT_EQ((*ConvertStorage(storage, DType::kF32, DType::kF32, 1000, other_))->CachedDigest(),
            std::nullopt);
  const uint64_t digest = *storage->Digest();
  EXPECT_EQ((*ConvertStorage(storage, DType::kF32, DType::kF32, 1000, hidden_))->CachedDigest(),
            digest);
  EXPECT_EQ((*ConvertStorage(storage, DType::kF32, DType::kF16, 1000, cpu_))->CachedDigest(),
            std::nullopt);
}

TEST_F(ConvertStorageTest, NothingIsAFineNumberOfElements) {
  const StorageRef empty = *TensorStorage::Allocate(cpu_, 0);
  auto converted = ConvertStorage(empty, DType::kF32, DType::kF16, 0, hidden_, &compute_);
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_EQ((*converted)->size(), 0u);
}

TEST_F(ConvertStorageTest, SaysWhenTheDeviceFailsOrIsFull) {
  const StorageRef storage = *TensorStorage::FromHost(cpu_, RandomBytes(kCount * 4));
  for (ComputePool* compute : {&compute_, static_cast<ComputePool*>(nullptr)}) {
    hidden_.FailAt(2);
    const auto failed = ConvertStorage(storage, DType::kF32, DType::kF32, kCount, hidden_, compute);
    EXPECT_EQ(failed.status(), absl::InternalError("the device failed"));
  }
  CpuDevice small(1000);
  const auto full = ConvertStorage(storage, DType::kF32, DType::kF32, kCount, small);
  EXPECT_EQ(GetReason(full.status()), Reason::kDeviceMemory);
  EXPECT_EQ(hidden_.pool()->usage().used_bytes, 0u);
}

// A module whose state lies on a device that the host cannot read.
TEST_F(ConvertStorageTest, AStateComesBackFromAHiddenDevice) {
  TensorSpec weight;
  weight.name = "weight";
  weight.shape = *Shape::Create({100});
  TensorSpec tied = weight;
  tied.name = "tied";
  tied.alias_of = "weight";
  TensorSpec count;
  count.name = "count";
  count.kind = TensorKind::kBuffer;
  count.dtype = DType::kI64;
  ModuleVersion version;
  version.schema = *ModuleSchema::Create({weight, tied, count}, 5);
  version.device = &cpu_;
  const std::vector<uint8_t> weights = RandomBytes(400);
  version.storages = {*TensorStorage::FromHost(cpu_, weights), nullptr,
                      *TensorStorage::FromHost(cpu_, RandomBytes(8))};
  version.storages[1] = version.storages[0];

  auto away = MoveState(version, nullptr, OptimizerState(), hidden_, std::nullopt, &compute_);
  ASSERT_TRUE(away.ok() && *away) << away.status();
  EXPECT_EQ((*away)->schema, version.schema);
  EXPECT_EQ((*away)->storages[0], (*away)->storages[1]);
  EXPECT_FALSE((*away)->parameters_cast);
  ModuleVersion hidden = version;
  hidden.device = &hidden_;
  hidden.storages = (*away)->storages;
  away->reset();

  auto back = MoveState(hidden, nullptr, OptimizerState(), cpu_, DType::kF64, &compute_);
  ASSERT_TRUE(back.ok() && *back) << back.status();
  EXPECT_EQ((*back)->schema->revision(), 6u);
  EXPECT_EQ((*back)->schema->spec(1).dtype, DType::kF64);
  EXPECT_EQ((*back)->schema->spec(2).dtype, DType::kI64);
  EXPECT_EQ((*back)->cast, std::vector<bool>({true, true, false}));
  std::vector<uint8_t> expected(800);
  CastElements(DType::kF32, weights.data(), DType::kF64, expected.data(), 100);
  EXPECT_EQ(ReadBack(*(*back)->storages[0]), expected);
  EXPECT_EQ(ReadBack(*(*back)->storages[2]), ReadBack(*version.storages[2]));

  auto nothing = MoveState(version, nullptr, OptimizerState(), cpu_, DType::kF32, &compute_);
  ASSERT_TRUE(nothing.ok()) << nothing.status();
  EXPECT_FALSE(nothing->has_value());
}

}  // namespace
}  // namespace modelstate
