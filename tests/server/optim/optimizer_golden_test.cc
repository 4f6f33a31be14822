// Fifty steps against the recorded results of torch.optim (tests/data/make_optimizer_goldens.py).

#include <bit>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/float_cast.h"
#include "tests/server/optim/step_fixture.h"

namespace modelstate {
namespace {

using testing::DrawMany;
using testing::SplitMix64;
using testing::SteppedModule;

// torch contracts to fused multiply-adds where the processor has them; these rules never do. So
// each step may differ by a rounding, relative to the terms of its sums: the values drift by some
// units in the last place of the tensor's largest element (the first bound), by more of their own
// units where an element passes close to zero (the second; there the unit is that of 2^-6 at
// least).
constexpr double kMaxTensorUlp = 16;
constexpr double kMaxElementUlp = 128;
constexpr double kFloor = 0x1p-6;

struct Distance {
  double tensor_ulp = 0;
  double element_ulp = 0;
  void Join(const Distance& other) {
    tensor_ulp = std::max(tensor_ulp, other.tensor_ulp);
    element_ulp = std::max(element_ulp, other.element_ulp);
  }
};

nlohmann::json Goldens(const std::string& version) {
  std::ifstream file(MODELSTATE_SOURCE_DIR "/tests/data/optimizer_torch_" + version + ".json");
  EXPECT_TRUE(file) << version;
  return nlohmann::json::parse(file);
}

template <typename T>
std::vector<T> Decode(const nlohmann::json& hexadecimal) {
  const std::string bytes = absl::HexStringToBytes(hexadecimal.get<std::string>());
  return SteppedModule::As<T>(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
}

template <typename T>
double Ulp(T magnitude) {
  return static_cast<double>(std::nextafter(magnitude, std::numeric_limits<T>::infinity()) -
                             magnitude);
}

template <typename T>
Distance Compare(const std::vector<T>& ours, const std::vector<T>& torchs) {
  EXPECT_EQ(ours.size(), torchs.size());
  T largest = 0;
  for (T value : torchs) largest = std::max(largest, std::fabs(value));
  Distance worst;
  for (size_t i = 0; i < ours.size(); ++i) {
    const double difference = std::fabs(ours[i] - torchs[i]);
    const T magnitude = std::max(std::fabs(torchs[i]), static_cast<T>(kFloor));
    worst.Join({difference / Ulp(largest), difference / Ulp(magnitude)});
  }
  return worst;
}

OptimizerConfig ConfigOf(const nlohmann::json& golden) {
  OptimizerConfig config;
  config.algorithm = *ParseAlgorithm(golden["algorithm"].get<std::string>());
  const nlohmann::json& options = golden["options"];
  auto number = [&](const char* key, std::optional<double>& field) {
    if (options.contains(key)) field = options[key].get<double>();
  };
  auto flag = [&](const char* key, std::optional<bool>& field) {
    if (options.contains(key)) field = options[key].get<bool>();
  };
  Hyperparameters& h = config.hyperparameters;
  number("lr", h.lr);
  number("momentum", h.momentum);
  number("dampening", h.dampening);
  number("weight_decay", h.weight_decay);
  number("beta1", h.beta1);
  number("beta2", h.beta2);
  number("eps", h.eps);
  flag("nesterov", h.nesterov);
  flag("maximize", h.maximize);
  return config;
}

std::string Name(size_t parameter) { return absl::StrCat("p", parameter); }

bool HasGradient(int step, size_t parameter) {
  return SplitMix64(static_cast<uint64_t>(step) * 31 + parameter) % 5 != 0;
}

template <typename T>
Distance Replay(const nlohmann::json& golden, const std::vector<size_t>& sizes) {
  CpuDevice device(uint64_t{1} << 30);
  SteppedModule module(device);
  const DType dtype = std::is_same_v<T, double> ? DType::kF64 : DType::kF32;
  std::vector<TensorSpec> specs;
  for (size_t p = 0; p < sizes.size(); ++p) {
    specs.push_back(SteppedModule::Parameter(Name(p), {static_cast<int64_t>(sizes[p])}, dtype));
  }
  module.Create(std::move(specs), ConfigOf(golden));
  for (size_t p = 0; p < sizes.size(); ++p) {
    module.Set(Name(p), DrawMany<T>(p + 1, sizes[p]));
  }
  Distance worst;
  for (int step = 1; step <= 50; ++step) {
    SteppedModule::Push push;
    for (size_t p = 0; p < sizes.size(); ++p) {
      if (!HasGradient(step, p)) continue;
      push.emplace_back(Name(p), SteppedModule::Bytes(DrawMany<T>(1000 + step * 16 + p, sizes[p])));
    }
    absl::StatusOr<StepResult> result = module.Step(push);
    EXPECT_TRUE(result.ok()) << result.status();
    const auto kept = golden["steps"].find(std::to_string(step));
    if (kept == golden["steps"].end()) continue;
    for (size_t p = 0; p < sizes.size(); ++p) {
      const std::string name = Name(p);
      const nlohmann::json& torchs = (*kept)[p];
      worst.Join(Compare(module.Get<T>(name), Decode<T>(torchs["value"])));
      for (const SlotInfo& slot : AllSlots(module.optimizer->algorithm(), dtype)) {
        if (!torchs.contains(slot.name)) {
          EXPECT_FALSE(module.state.parameters[p].slots[slot.place]) << name << " " << slot.name;
          continue;
        }
        worst.Join(Compare(module.Slot<T>(name, slot.place), Decode<T>(torchs[slot.name])));
      }
    }
  }
  return worst;
}

class OptimizerGolden : public ::testing::TestWithParam<const char*> {};

TEST_P(OptimizerGolden, FiftyStepsFollowTorch) {
  const nlohmann::json goldens = Goldens(GetParam());
  const std::vector<size_t> sizes = goldens["sizes"].get<std::vector<size_t>>();
  ASSERT_GE(goldens["configurations"].size(), 15u);
  for (const nlohmann::json& golden : goldens["configurations"]) {
    const std::string name = golden["name"];
    SCOPED_TRACE(name);
    const Distance worst =
        golden["dtype"] == "float64" ? Replay<double>(golden, sizes) : Replay<float>(golden, sizes);
    std::printf("torch %s %-20s at most %g ulp of the tensor's largest, %g of the element\n",
                GetParam(), name.c_str(), worst.tensor_ulp, worst.element_ulp);
    EXPECT_LE(worst.tensor_ulp, kMaxTensorUlp);
    EXPECT_LE(worst.element_ulp, kMaxElementUlp);
  }
}

TEST_P(OptimizerGolden, ClippingFollowsTorch) {
  const nlohmann::json goldens = Goldens(GetParam());
  const std::vector<size_t> sizes = goldens["sizes"].get<std::vector<size_t>>();
  for (const nlohmann::json& golden : goldens["clip"]) {
    CpuDevice device(uint64_t{1} << 30);
    SteppedModule module(device);
    std::vector<TensorSpec> specs;
    SteppedModule::Push push;
    for (size_t p = 0; p < sizes.size(); ++p) {
      specs.push_back(SteppedModule::Parameter(Name(p), {static_cast<int64_t>(sizes[p])}));
      push.emplace_back(Name(p), SteppedModule::Bytes(DrawMany<float>(1016 + p, sizes[p])));
    }
    OptimizerConfig config;
    config.algorithm = Algorithm::kSgd;
    config.hyperparameters.lr = 1;
    config.max_grad_norm = golden["max_norm"].get<double>();
    module.Create(std::move(specs), config);  // parameters are 0: a step with lr 1 shows -gradient
    absl::StatusOr<StepResult> result = module.Step(push);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_NEAR(result->grad_norm, golden["norm"].get<double>(), 1e-6 * result->grad_norm);
    for (size_t p = 0; p < sizes.size(); ++p) {
      std::vector<float> clipped = module.Get<float>(Name(p));
      for (float& value : clipped) value = -value;
      EXPECT_LE(Compare(clipped, Decode<float>(golden["clipped"][p])).element_ulp, 4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Torch, OptimizerGolden, ::testing::Values("1.13.1", "2.15.0"),
                         [](const auto& info) {
                           return std::string(info.param) == "1.13.1" ? "1_13_1" : "2_15_0";
                         });

// A narrow parameter steps as its float32 master does, and is the master's rounding: as mixed
// precision training is done, and unlike torch.optim on a bfloat16 tensor.
template <typename Load, typename Store>
void CheckMaster(DType dtype, Load load, Store store) {
  constexpr size_t kSize = 5000;
  OptimizerConfig config;
  config.algorithm = Algorithm::kAdamW;
  config.hyperparameters.lr = 0.01;
  CpuDevice device(uint64_t{1} << 30);
  SteppedModule narrow(device);
  narrow.Create({SteppedModule::Parameter("w", {kSize}, dtype)}, config);
  SteppedModule wide(device);
  wide.Create({SteppedModule::Parameter("w", {kSize})}, config);
  auto to_narrow = [&](const std::vector<float>& values) {
    std::vector<uint16_t> out;
    for (float value : values) out.push_back(store(value));
    return out;
  };
  auto to_wide = [&](const std::vector<uint16_t>& values) {
    std::vector<float> out;
    for (uint16_t value : values) out.push_back(load(value));
    return out;
  };
  const std::vector<uint16_t> start = to_narrow(DrawMany<float>(1, kSize));
  narrow.Set("w", start);
  wide.Set("w", to_wide(start));
  for (uint64_t step = 1; step <= 20; ++step) {
    const std::vector<uint16_t> gradient = to_narrow(DrawMany<float>(100 + step, kSize));
    ASSERT_TRUE(narrow.Step({{"w", SteppedModule::Bytes(gradient)}}).ok());
    ASSERT_TRUE(wide.Step({{"w", SteppedModule::Bytes(to_wide(gradient))}}).ok());
  }
  EXPECT_EQ(narrow.Slot<float>("w", 0), wide.Get<float>("w"));
  EXPECT_EQ(narrow.Get<uint16_t>("w"), to_narrow(wide.Get<float>("w")));
  EXPECT_EQ(narrow.Slot<float>("w", 1), wide.Slot<float>("w", 1));
}

TEST(NarrowParameter, BFloat16StepsAsItsMaster) {
  CheckMaster(DType::kBF16, BFloat16ToFloat, FloatToBFloat16);
}
TEST(NarrowParameter, HalfStepsAsItsMaster) { CheckMaster(DType::kF16, HalfToFloat, FloatToHalf); }

}  // namespace
}  // namespace modelstate
