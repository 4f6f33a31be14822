#include "client/files/compare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/casts.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/base/tensor_cast.h"
#include "tests/client/fake_server.h"
#include "tests/common/allocation_meter.h"

namespace modelstate::client {
namespace {

class MemorySource final : public TensorSource {
 public:
  explicit MemorySource(const std::string& name) { name_ = name; }

  // Elements are `values` cast to `dtype`.
  void Add(const std::string& name, DType dtype, const std::vector<double>& values) {
    TensorSpec spec;
    spec.name = name;
    spec.dtype = dtype;
    spec.shape = *Shape::Create({static_cast<int64_t>(values.size())});
    std::vector<uint8_t> bytes(spec.nbytes());
    CastElements(DType::kF64, reinterpret_cast<const uint8_t*>(values.data()), dtype, bytes.data(),
                 static_cast<int64_t>(values.size()));
    specs_.push_back(spec);
    bytes_.push_back(std::move(bytes));
  }

  // One element of 8 bytes, with these bits.
  void AddRaw(const std::string& name, DType dtype, int64_t bits) {
    Add(name, dtype, {0});
    std::memcpy(bytes_.back().data(), &bits, sizeof(bits));
  }

  absl::StatusOr<std::vector<absl::Span<const uint8_t>>> Read(
      absl::Span<const size_t> indices) override {
    std::vector<absl::Span<const uint8_t>> result;
    for (size_t index : indices) result.push_back(bytes_[index]);
    return result;
  }

 private:
  std::vector<std::vector<uint8_t>> bytes_;
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

TensorComparison CompareOne(DType dtype_a, std::vector<double> a, DType dtype_b,
                            std::vector<double> b) {
  MemorySource source_a("a");
  MemorySource source_b("b");
  source_a.Add("t", dtype_a, a);
  source_b.Add("t", dtype_b, b);
  return CompareTensors(source_a, source_b)->tensors.at(0);
}

TEST(CompareTensors, CountsDifferencesAndNonFiniteElements) {
  const TensorComparison result =
      CompareOne(DType::kF32, {1, 2, kNan, 4, 5}, DType::kF32, {1, 2.5, 3, kInf, 4});
  EXPECT_FALSE(result.equal);
  EXPECT_EQ(result.different, 4u);
  EXPECT_EQ(result.max_abs_difference, 1);
  EXPECT_EQ(result.nonfinite_a, 1u);
  EXPECT_EQ(result.nonfinite_b, 1u);
  EXPECT_EQ(result.what, "4 of 5 elements differ, by at most 1, non-finite 1 and 1");
}

TEST(CompareTensors, EqualBitsAreEqualAlsoWhenNotFinite) {
  const TensorComparison result = CompareOne(DType::kBF16, {1, kNan}, DType::kBF16, {1, kNan});
  EXPECT_TRUE(result.equal);
  EXPECT_EQ(result.what, "equal, non-finite 1 and 1");
  // 0 and -0 are other bits.
  EXPECT_FALSE(CompareOne(DType::kF32, {0.0}, DType::kF32, {-0.0}).equal);
}

TEST(CompareTensors, OtherDTypesAreComparedAsDoubles) {
  const TensorComparison same = CompareOne(DType::kF32, {1, 0.5}, DType::kBF16, {1, 0.5});
  EXPECT_FALSE(same.equal);
  EXPECT_EQ(same.different, 0u);
  EXPECT_EQ(same.what, "dtype F32 and BF16, values equal");
  const TensorComparison rounded = CompareOne(DType::kF64, {1.001}, DType::kBF16, {1.001});
  EXPECT_EQ(rounded.different, 1u);
  EXPECT_NEAR(rounded.max_abs_difference, 0.001, 1e-9);
  EXPECT_EQ(CompareOne(DType::kI64, {3, 4}, DType::kF32, {3, 7}).max_abs_difference, 3);
  EXPECT_EQ(CompareOne(DType::kC64, {3, 4}, DType::kF32, {3, 7}).max_abs_difference, 3);
}

TEST(CompareTensors, IntegersAreComparedWithoutRounding) {
  const auto compare = [](DType dtype_a, int64_t a, DType dtype_b, int64_t b) {
    MemorySource source_a("a");
    MemorySource source_b("b");
    source_a.AddRaw("t", dtype_a, a);
    source_b.AddRaw("t", dtype_b, b);
    return CompareTensors(source_a, source_b)->tensors.at(0);
  };
  constexpr int64_t kLarge = int64_t{1} << 60;
  EXPECT_EQ(compare(DType::kI64, kLarge, DType::kI64, kLarge + 1).what,
            "1 of 1 elements differ, by at most 1");
  EXPECT_EQ(compare(DType::kI64, INT64_MIN, DType::kI64, INT64_MAX).what,
            "1 of 1 elements differ, by at most 18446744073709551615");
  EXPECT_EQ(compare(DType::kI64, INT64_MIN, DType::kU64, -1).max_integer_difference, UINT64_MAX);
  EXPECT_EQ(compare(DType::kU64, -1, DType::kI64, -1).different, 1u) << "2^64 - 1 against -1";
  EXPECT_EQ(compare(DType::kU64, kLarge, DType::kI64, kLarge).what,
            "dtype U64 and I64, values equal");
  const auto bits = [](double value) { return absl::bit_cast<int64_t>(value); };
  const double large = static_cast<double>(kLarge);
  EXPECT_EQ(compare(DType::kI64, kLarge, DType::kF64, bits(large)).different, 0u);
  EXPECT_EQ(compare(DType::kF64, bits(large), DType::kI64, kLarge + 1).max_abs_difference, 1);
  EXPECT_EQ(compare(DType::kU64, -1, DType::kF64, bits(0x1p64)).max_abs_difference, 1);
  EXPECT_EQ(compare(DType::kI64, 3, DType::kF64, bits(2.75)).max_abs_difference, 0.25);
  EXPECT_EQ(compare(DType::kI64, 3, DType::kF64, bits(kNan)).different, 1u);
  EXPECT_EQ(compare(DType::kI64, 3, DType::kF64, bits(1e300)).max_abs_difference, 1e300);
  // Nor is a double rounded to the parts of a complex number.
  EXPECT_EQ(CompareOne(DType::kF64, {1.001, 2}, DType::kC64, {1.001, 2}).different, 1u);
}

TEST(CompareTensors, LargeTensorsAreComparedInParts) {
  constexpr size_t kElements = size_t{5} << 20;  // more than a batch of 32 MiB as doubles
  std::vector<double> a(kElements, 1);
  std::vector<double> b = a;
  b[0] = 3;
  b[kElements / 2] = kNan;
  b[kElements - 1] = 5;
  const TensorComparison result = CompareOne(DType::kF64, a, DType::kF32, b);
  EXPECT_EQ(result.elements, kElements);
  EXPECT_EQ(result.different, 3u);
  EXPECT_EQ(result.max_abs_difference, 4);
  EXPECT_EQ(result.nonfinite_b, 1u);
  b[kElements / 2] = 1;
  EXPECT_EQ(CompareOne(DType::kI64, a, DType::kI64, b).max_integer_difference, 4u);
  EXPECT_TRUE(CompareOne(DType::kI64, b, DType::kI64, b).equal);
}

// A file of a few bytes can say that it has a tensor of many.
TEST(CompareTensors, OfAFileNoLargeTensorIsHeldWhole) {
  constexpr uint64_t kBytes = uint64_t{48} << 20;
  std::string header = absl::StrCat(R"({"w":{"dtype":"U8","shape":[)", kBytes,
                                    R"(],"data_offsets":[0,)", kBytes, "]}}");
  const std::string size(1, static_cast<char>(header.size()));
  std::vector<std::string> paths;
  for (const char* name : {"compare_a.safetensors", "compare_b.safetensors"}) {
    paths.push_back(testing::TempDir() + name);
    std::ofstream(paths.back(), std::ios::binary) << size << std::string(7, '\0') << header;
    std::filesystem::resize_file(paths.back(), 8 + header.size() + kBytes);
  }
  std::fstream changed(paths[1], std::ios::in | std::ios::out | std::ios::binary);
  changed.seekp(-1, std::ios::end);
  changed.put(7);
  changed.close();
  ResetPeakAllocation();
  const auto a = OpenFileSource(paths[0]);
  const auto b = OpenFileSource(paths[1]);
  const auto comparison = CompareTensors(**a, **b);
  EXPECT_LT(PeakAllocation(), size_t{16} << 20);
  ASSERT_TRUE(comparison.ok()) << comparison.status();
  EXPECT_EQ(comparison->tensors[0].different, 1u);
  EXPECT_EQ(comparison->tensors[0].max_integer_difference, 7u);
  for (const std::string& path : paths) std::filesystem::remove(path);
}

TEST(CompareTensors, SaysWhatOnlyOneHasAndOtherShapes) {
  MemorySource a("a.pth");
  MemorySource b("m, version 3");
  a.Add("both", DType::kF32, {1});
  a.Add("first", DType::kF32, {1});
  a.Add("shape", DType::kF32, {1});
  b.Add("second", DType::kF32, {1});
  b.Add("shape", DType::kF32, {1, 2});
  b.Add("both", DType::kF32, {1});
  const absl::StatusOr<Comparison> result = CompareTensors(a, b);
  ASSERT_TRUE(result.ok());
  ASSERT_EQ(result->tensors.size(), 4u);
  EXPECT_EQ(result->equal, 1u);
  EXPECT_EQ(result->tensors[0].what, "equal");
  EXPECT_EQ(result->tensors[1].what, "only in a.pth");
  EXPECT_EQ(result->tensors[2].what, "shape [1] and [2]");
  EXPECT_EQ(result->tensors[3].what, "only in m, version 3");
}

TEST(CompareTensors, AVersionOfAModuleIsHeldWhileItIsRead) {
  FakeServer server;
  const Client client = server.Connect();
  {
    const absl::StatusOr<std::unique_ptr<TensorSource>> source =
        OpenModuleSource(client, "m", 0, "", nullptr);
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ((*source)->name(), "m, version 5");
    EXPECT_EQ((*source)->specs().size(), server.specs.size());
    EXPECT_EQ(server.pins, 1);
    EXPECT_EQ(server.releases, 0);
    const auto bytes = (*source)->Read({3, 1});
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_EQ((*bytes)[0], server.bytes(3));
    EXPECT_EQ((*bytes)[1], server.bytes(1));
    EXPECT_EQ(server.stream_snapshot_id, "pin-1");
  }
  EXPECT_EQ(server.releases, 1);
}

TEST(OpenModuleSource, AGivenVersionIsReadAlsoWhenNothingCanBePinned) {
  FakeServer server;
  const Client client = server.Connect();
  server.refuse_pins = true;
  for (uint64_t version : {3, 5}) {  // one held by somebody, and the current one
    const absl::StatusOr<std::unique_ptr<TensorSource>> source =
        OpenModuleSource(client, "m", version, "", nullptr);
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ((*source)->name(), absl::StrCat("m, version ", version));
    EXPECT_TRUE((*source)->Read({3}).ok());
    EXPECT_EQ(server.stream_snapshot_id, "");
  }
  EXPECT_EQ(server.pin_calls, 1) << "another than the current one is not pinned at all";
  EXPECT_EQ(server.releases, 0);
  EXPECT_EQ(GetReason(OpenModuleSource(client, "m", 0, "", nullptr).status()),
            Reason::kSnapshotLimit);
  EXPECT_EQ(GetReason(OpenModuleSource(client, "x", 3, "", nullptr).status()),
            Reason::kModuleNotFound);
}

TEST(OpenModuleSource, RenewsItsPinWhileNothingIsRead) {
  FakeServer server;
  const Client client = server.Connect();
  absl::Mutex mutex;
  int renewals = 0;
  server.on_renewal = [&] {
    absl::MutexLock lock(&mutex);
    if (++renewals == 4) server.held = "none";  // from here on they fail
  };
  const auto wait_for = [&](int count) {
    const auto reached = [&] { return renewals >= count; };
    absl::MutexLock lock(&mutex);
    mutex.Await(absl::Condition(&reached));
  };
  {
    const absl::StatusOr<std::unique_ptr<TensorSource>> source =
        OpenModuleSource(client, "m", 0, "", nullptr, absl::Milliseconds(3));
    ASSERT_TRUE(source.ok()) << source.status();
    // The fifth is sent when the client has seen the fourth fail.
    wait_for(5);
    const absl::Status status = (*source)->Read({1}).status();
    EXPECT_EQ(GetReason(status), Reason::kSnapshotNotFound);
    EXPECT_THAT(std::string(status.message()),
                ::testing::HasSubstr("the pin could not be renewed (no such pin"));
  }
  EXPECT_EQ(server.releases, 1);
}

}  // namespace
}  // namespace modelstate::client
