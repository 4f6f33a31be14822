#include "server/state/initializer.h"

#include <gmock/gmock.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "server/device/cpu/cpu_device.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Kind = Initializer::Kind;
using Json = nlohmann::json;

const Json& Goldens() {
  static const Json goldens = [] {
    std::ifstream in(MODELSTATE_SOURCE_DIR "/tests/data/initializers.json");
    return Json::parse(in);
  }();
  return goldens;
}

TensorSpec Spec(const std::string& name, const std::vector<int64_t>& dims,
                DType dtype = DType::kF32) {
  TensorSpec spec;
  spec.name = name;
  spec.shape = *Shape::Create(dims);
  spec.dtype = dtype;
  return spec;
}

Initializer Normal(double mean, double std) {
  Initializer normal;
  normal.kind = Kind::kNormal;
  normal.mean = mean;
  normal.std = std;
  return normal;
}

Initializer Uniform(double low, double high) {
  Initializer uniform;
  uniform.low = low;
  uniform.high = high;
  return uniform;
}

class FillTest : public ::testing::Test {
 protected:
  RefPtr<TensorStorage> Fill(const Initializer& initializer, uint64_t seed, const TensorSpec& spec,
                             size_t threads = 1) {
    ComputePool compute(threads);
    absl::StatusOr<Draw> draw = ResolveInitializer(initializer, spec);
    EXPECT_TRUE(draw.ok()) << draw.status();
    RefPtr<TensorStorage> storage = *TensorStorage::Allocate(device_, spec.nbytes());
    EXPECT_TRUE(FillStorage(*draw, seed, spec, compute, *storage).ok());
    return storage;
  }

  std::vector<double> Doubles(const Initializer& initializer, uint64_t seed, int64_t count) {
    const RefPtr<TensorStorage> storage =
        Fill(initializer, seed, Spec("weight", {count}, DType::kF64));
    std::vector<double> values(static_cast<size_t>(count));
    std::memcpy(values.data(), storage->HostBytes().data(), storage->size());
    return values;
  }

  CpuDevice device_{uint64_t{64} << 20};
};

// Of Random123's known-answer file, as 64-bit halves.
TEST(Philox, KnownAnswers) {
  const auto words = [](uint64_t key, uint64_t low, uint64_t high) {
    const initializer_internal::PhiloxBlock block = initializer_internal::Philox(key, low, high);
    return std::vector<uint32_t>(block.words, block.words + 4);
  };
  constexpr uint64_t kOnes = ~uint64_t{0};
  EXPECT_THAT(words(0, 0, 0), ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  EXPECT_THAT(words(kOnes, kOnes, kOnes),
              ElementsAre(0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  EXPECT_THAT(words(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e),
              ElementsAre(0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(InitializerMath, AgreesWithLongDoubleOfTheLibrary) {
  double worst_log = 0;
  double worst_turn = 0;
  for (uint64_t i = 1; i <= 200000; ++i) {
    const uint64_t bits = i <= 1000 ? i : i * 0x9E3779B97F4A7C15u >> 11;
    const double x = static_cast<double>(bits) * 0x1p-53;
    const long double log = std::log(static_cast<long double>(x));
    if (x < 1) {
      const long double error = std::abs((initializer_internal::Log(x) - log) / log);
      worst_log = std::max(worst_log, static_cast<double>(error));
    }
    const long double angle = 2 * 3.141592653589793238462643383279502884L * x;
    const initializer_internal::CosSin turn = initializer_internal::CosSinOfTurns(x);
    worst_turn = std::max({worst_turn, static_cast<double>(std::abs(turn.cos - std::cos(angle))),
                           static_cast<double>(std::abs(turn.sin - std::sin(angle)))});
  }
  EXPECT_LT(worst_log, 1e-15);
  EXPECT_LT(worst_turn, 3e-16);
  EXPECT_EQ(initializer_internal::Log(1), 0);
  const double last = 1 - 0x1p-53;
  EXPECT_LT(std::abs(initializer_internal::Log(last) + 0x1p-53), 1e-31);
}

TEST(Initializer, BoundsAreTorchs) {
  ASSERT_GT(Goldens()["bounds"].size(), 300u);
  for (const Json& item : Goldens()["bounds"]) {
    SCOPED_TRACE(item.dump());
    Initializer initializer;
    const std::string kind = item["kind"];
    initializer.kind = kind == "kaiming_uniform"  ? Kind::kKaimingUniform
                       : kind == "kaiming_normal" ? Kind::kKaimingNormal
                       : kind == "xavier_uniform" ? Kind::kXavierUniform
                                                  : Kind::kXavierNormal;
    initializer.a = item.value("a", 0.0);
    initializer.mode = item.value("mode", "fan_in");
    initializer.nonlinearity = item.value("nonlinearity", "leaky_relu");
    initializer.gain = item.value("gain", 1.0);
    absl::StatusOr<Draw> draw = ResolveInitializer(initializer, Spec("w", item["shape"]));
    ASSERT_TRUE(draw.ok()) << draw.status();
    EXPECT_EQ(draw->normal, kind.find("normal") != std::string::npos);
    EXPECT_DOUBLE_EQ(draw->first, item["first"].get<double>());
    EXPECT_DOUBLE_EQ(draw->second, item["second"].get<double>());
  }
}

TEST(Initializer, StreamsAreAsDocumented) {
  for (const Json& item : Goldens()["streams"]) {
    const ElementStream stream({item["normal"], item["first"], item["second"]}, item["seed"],
                               item["name"].get<std::string>());
    for (size_t i = 0; i < item["indices"].size(); ++i) {
      const uint64_t index = item["indices"][i];
      const std::pair<double, double> pair = stream.Pair(index / 2);
      const double value = index % 2 == 0 ? pair.first : pair.second;
      const double expected = item["values"][i];
      // The script's uniform numbers are the same doubles; its normal ones use another libm.
      EXPECT_NEAR(value, expected, item["normal"] ? 1e-14 : 0) << item["name"] << " " << index;
    }
  }
}

// These digests are part of the interface: a module that was made with a seed can be made again.
TEST_F(FillTest, SameBitsAsEver) {
  struct Case {
    Initializer initializer;
    DType dtype;
    const char* digest;
  };
  Initializer kaiming;
  kaiming.kind = Kind::kKaimingUniform;
  const Case cases[] = {
      {Uniform(0, 1), DType::kF64, "06d05b78912067cb"},
      {Uniform(-1, 1), DType::kF32, "601c6b065825b076"},
      {Normal(0, 1), DType::kF64, "8d351131c0d419a7"},
      {Normal(0, 0.02), DType::kF32, "2965ab41859d955a"},
      {Normal(0, 1), DType::kF16, "68b6b7caf7227f94"},
      {Normal(0, 1), DType::kBF16, "61af67e4c51a7f71"},
      {Normal(0, 1), DType::kF8E4M3, "7bade74cdfbe285a"},
      {Normal(0, 1), DType::kF8E5M2, "3abb933d16eef938"},
      {kaiming, DType::kF32, "c7c08a803ceda58e"},
  };
  for (const Case& c : cases) {
    const TensorSpec spec = Spec("layer1.0.conv1.weight", {64, 37, 3, 3}, c.dtype);
    EXPECT_EQ(DigestToHex(*Fill(c.initializer, 42, spec)->Digest()), c.digest)
        << DTypeName(c.dtype);
  }
}

TEST_F(FillTest, DoesNotDependOnThreads) {
  // An odd number of elements, and not a whole number of tasks.
  const TensorSpec spec = Spec("w", {3, 33333}, DType::kBF16);
  for (const Initializer& initializer : {Uniform(-2, 1), Normal(1, 3)}) {
    const uint64_t alone = *Fill(initializer, 7, spec, 1)->Digest();
    for (size_t threads : {2, 3, 8}) {
      EXPECT_EQ(*Fill(initializer, 7, spec, threads)->Digest(), alone) << threads;
    }
  }
}

TEST_F(FillTest, SeedAndNameMakeTheNumbers) {
  const TensorSpec spec = Spec("a.weight", {1000});
  const uint64_t digest = *Fill(Normal(0, 1), 1, spec)->Digest();
  EXPECT_EQ(*Fill(Normal(0, 1), 1, spec)->Digest(), digest);
  EXPECT_NE(*Fill(Normal(0, 1), 2, spec)->Digest(), digest);
  EXPECT_NE(*Fill(Normal(0, 1), uint64_t{1} << 32, spec)->Digest(), digest);
  EXPECT_NE(*Fill(Normal(0, 1), 1, Spec("b.weight", {1000}))->Digest(), digest);
  // The position counts, not the shape: a longer tensor begins with the same numbers.
  const RefPtr<TensorStorage> longer = Fill(Normal(0, 1), 1, Spec("a.weight", {3, 1000}));
  EXPECT_EQ(Xxh3(longer->HostBytes().subspan(0, 4000)), digest);
}

// Each element is the double of the stream rounded once: never by way of a float.
TEST_F(FillTest, RoundsOnce) {
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2}) {
    const int64_t count = 20000;
    const std::vector<double> exact = Doubles(Uniform(-1, 1), 3, count);
    const RefPtr<TensorStorage> storage = Fill(Uniform(-1, 1), 3, Spec("weight", {count}, dtype));
    std::vector<double> rounded(exact.size());
    CastElements(dtype, storage->HostBytes().data(), DType::kF64,
                 reinterpret_cast<uint8_t*>(rounded.data()), count);
    const int bits = dtype == DType::kF16 ? 11 : dtype == DType::kBF16 ? 8 : 4;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double unit = std::ldexp(1.0, std::max(std::ilogb(exact[i]), -6) + 1 - bits);
      ASSERT_LE(std::abs(rounded[i] - exact[i]), (dtype == DType::kF8E5M2 ? 1 : 0.5) * unit)
          << DTypeName(dtype) << " element " << i;
    }
  }
}

// Kolmogorov-Smirnov: sqrt(n) times the largest distance from the exact distribution exceeds 1.95
// with probability 0.001; the numbers are fixed, so this holds always or never.
TEST_F(FillTest, DistributionsAreRight) {
  constexpr int64_t kCount = 1000000;
  const auto distance = [](std::vector<double> values, auto cdf) {
    std::sort(values.begin(), values.end());
    double worst = 0;
    const double n = static_cast<double>(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      const double exact = cdf(values[i]);
      worst = std::max(
          {worst, exact - static_cast<double>(i) / n, static_cast<double>(i + 1) / n - exact});
    }
    return worst * std::sqrt(n);
  };
  for (uint64_t seed : {0, 1, 12345}) {
    SCOPED_TRACE(seed);
    const std::vector<double> normal = Doubles(Normal(3, 2), seed, kCount);
    EXPECT_LT(distance(normal, [](double x) { return 0.5 * std::erfc((3 - x) / 2 / M_SQRT2); }),
              1.95);
    double moments[5] = {};
    double lag = 0;
    for (size_t i = 0; i < normal.size(); ++i) {
      const double z = (normal[i] - 3) / 2;
      for (int k = 1; k <= 4; ++k) moments[k] += std::pow(z, k) / kCount;
      if (i > 0) lag += z * (normal[i - 1] - 3) / 2 / kCount;
    }
    // Five standard errors of a million draws.
    EXPECT_NEAR(moments[1], 0, 0.005);
    EXPECT_NEAR(moments[2], 1, 0.0071);
    EXPECT_NEAR(moments[3], 0, 0.0194);
    EXPECT_NEAR(moments[4], 3, 0.049);
    EXPECT_NEAR(lag, 0, 0.005) << "neighbours are independent";

    const std::vector<double> uniform = Doubles(Uniform(-1, 3), seed, kCount);
    EXPECT_LT(distance(uniform, [](double x) { return (x + 1) / 4; }), 1.95);
    EXPECT_GE(*std::min_element(uniform.begin(), uniform.end()), -1);
    EXPECT_LT(*std::max_element(uniform.begin(), uniform.end()), 3);
  }
}

TEST(Initializer, RefusesInTorchsWords) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const TensorSpec weight = Spec("conv.weight", {4, 3, 3, 3});
  const auto with = [](Kind kind, auto change) {
    Initializer initializer;
    initializer.kind = kind;
    change(initializer);
    return initializer;
  };
  const auto nothing = [](Initializer&) {};
  struct Case {
    Initializer initializer;
    TensorSpec spec;
    std::string text;
  };
  const Case cases[] = {
      {with(Kind::kKaimingUniform, nothing), Spec("bias", {4}),
       "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions"},
      {with(Kind::kXavierNormal, nothing), Spec("scalar", {}),
       "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions"},
      {with(Kind::kKaimingNormal, [](Initializer& i) { i.mode = "FAN_AVG"; }), weight,
       "Mode fan_avg not supported, please use one of ['fan_in', 'fan_out']"},
      {with(Kind::kKaimingNormal, [](Initializer& i) { i.nonlinearity = "gelu"; }), weight,
       "Unsupported nonlinearity gelu"},
      {with(Kind::kKaimingUniform, [&](Initializer& i) { i.a = nan; }), weight, "a is nan"},
      {with(Kind::kXavierUniform, [](Initializer& i) { i.gain = -1; }), weight,
       "uniform_ expects to return a [from, to) range, but found from="},
      {with(Kind::kXavierNormal, [](Initializer& i) { i.gain = -1; }), weight,
       "normal expects std >= 0.0, but found std -"},
      {Uniform(2, 1), weight,
       "uniform_ expects to return a [from, to) range, but found from=2 > to=1"},
      {Uniform(nan, 1), weight, "low is nan"},
      {Uniform(0, inf), weight, "high is inf"},
      {Uniform(-1e308, 1e308), Spec("w", {2}, DType::kF64), "high - low is inf"},
      {Uniform(-70000, 1), Spec("w", {2}, DType::kF16), "low is out of bounds for F16"},
      {Uniform(0, 1000), Spec("w", {2}, DType::kF8E4M3), "high is out of bounds for F8_E4M3"},
      {Normal(0, -1), weight, "normal expects std >= 0.0, but found std -1"},
      {Normal(inf, 1), weight, "mean is inf"},
      {Uniform(0, 1), Spec("n", {2}, DType::kI64), "its dtype is I64"},
      {Normal(0, 1), Spec("z", {2}, DType::kC64), "its dtype is C64"},
      {Normal(0, 1), Spec("b", {2}, DType::kBool), "its dtype is BOOL"},
  };
  for (const Case& c : cases) {
    const absl::Status error = ResolveInitializer(c.initializer, c.spec).status();
    EXPECT_EQ(GetReason(error), Reason::kInvalidField) << error;
    EXPECT_THAT(std::string(error.message()), HasSubstr(c.text));
    EXPECT_THAT(std::string(error.message()), HasSubstr("\"" + c.spec.name + "\""));
  }
}

TEST(Initializer, TensorsWithoutElementsAreLeftAlone) {
  for (Kind kind : {Kind::kKaimingUniform, Kind::kKaimingNormal, Kind::kXavierUniform,
                    Kind::kXavierNormal, Kind::kUniform, Kind::kNormal}) {
    Initializer initializer;
    initializer.kind = kind;
    EXPECT_TRUE(ResolveInitializer(initializer, Spec("w", {0, 3})).ok());
    EXPECT_TRUE(ResolveInitializer(initializer, Spec("w", {3, 0, 2})).ok());
  }
}

}  // namespace
}  // namespace modelstate
