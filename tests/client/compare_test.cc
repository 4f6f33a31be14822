#include "client/files/compare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/base/tensor_cast.h"
#include "tests/client/fake_server.h"

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

}  // namespace
}  // namespace modelstate::client
