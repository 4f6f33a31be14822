#include "server/optim/norm_stream.h"

#include <cmath>
#include <limits>
#include <random>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "absl/strings/str_cat.h"
#include "common/base/tensor_cast.h"
#include "server/optim/step_plan.h"
#include "tests/server/optim/step_fixture.h"

namespace modelstate {
namespace {

using testing::Draw;

std::vector<uint8_t> Gradient(DType dtype, size_t elements, double factor = 1) {
  std::vector<double> values(elements);
  for (size_t i = 0; i < elements; ++i) values[i] = Draw(elements, i) * factor;
  std::vector<uint8_t> bytes(elements * DTypeSize(dtype));
  CastElements(DType::kF64, reinterpret_cast<const uint8_t*>(values.data()), dtype, bytes.data(),
               static_cast<int64_t>(elements));
  return bytes;
}

// A module of one parameter, and one push to it.
struct OnePush {
  CpuDevice device{uint64_t{1} << 30};
  ComputePool compute{2};
  std::shared_ptr<MemoryBudget> budget =
      std::make_shared<MemoryBudget>(Reason::kPushMemory, "memory for pushes", "", ~0ull);
  ModuleVersion version;
  OptimizerState state;
  OptimizerConfig config;

  OnePush(DType dtype, int64_t elements) {
    TensorSpec spec;
    spec.name = "p";
    spec.dtype = dtype;
    spec.shape = *Shape::Create({elements});
    version.device = &device;
    version.schema = *ModuleSchema::Create({spec}, 1);
    RefPtr<TensorStorage> storage = *TensorStorage::Allocate(device, spec.nbytes());
    EXPECT_TRUE(device.FillZero(storage->MutableBuffer()).ok());
    version.storages.push_back(std::move(storage));
    state.parameters.resize(1);
    config.algorithm = Algorithm::kSgd;
  }

  StepResult Step(const std::vector<uint8_t>& bytes, DType dtype, double grad_scale,
                  std::optional<TensorNorm> norm) {
    const auto optimizer = *Optimizer::Create(config, *version.schema);
    StepOptions options;
    options.hyperparameters = *optimizer->Resolve({});
    GradientSet gradients = *StageGradients(
        version.schema, {{"p", TensorKind::kGradient, dtype, version.schema->spec(0).shape}},
        device, *budget);
    std::copy(bytes.begin(), bytes.end(), gradients.entries[0].storage->MutableHostBytes().begin());
    gradients.norm_scale = grad_scale;
    gradients.entries[0].norm = norm;
    std::vector<Contribution> contributions(1);
    contributions[0].parts.push_back({std::move(gradients), grad_scale});
    return *ApplyOptimizerStep(version, *optimizer, options, contributions, state, compute);
  }
};

TEST(NormStreamTest, HasTheBitsOfTheStepsOwnPassHoweverBytesAreCut) {
  constexpr uint32_t kSeed = 5;
  std::mt19937 random(kSeed);
  NormStream stream;
  for (DType parameter : {DType::kF32, DType::kF64, DType::kBF16}) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
      if (dtype == DType::kF64 && parameter != DType::kF64) continue;
      for (size_t elements : {0, 1, 63, 64, 4095, 4096, 4097, 50001}) {
        for (double scale : {1.0, 128.0, 3.0}) {
          const std::vector<uint8_t> bytes = Gradient(dtype, elements);
          // From an odd address, in random pieces, some of them larger than a block.
          std::vector<uint8_t> moved(bytes.size() + 1);
          std::copy(bytes.begin(), bytes.end(), moved.begin() + 1);
          stream.Begin(dtype, parameter, scale);
          for (size_t at = 0; at < bytes.size();) {
            const size_t size = std::min<size_t>(bytes.size() - at, 1 + random() % 70000);
            stream.Update(absl::MakeConstSpan(moved).subspan(1 + at, size));
            at += size;
          }
          const TensorNorm norm = stream.Finish();
          const double own = OnePush(parameter, static_cast<int64_t>(elements))
                                 .Step(bytes, dtype, scale, std::nullopt)
                                 .grad_norm;
          EXPECT_TRUE(norm.finite);
          EXPECT_EQ(std::sqrt(norm.sum_of_squares), own)
              << DTypeName(dtype) << " for " << DTypeName(parameter) << ", " << elements
              << " elements, scale " << scale << ", seed " << kSeed;
        }
      }
    }
  }
}

#if defined(__x86_64__)
TEST(NormStreamTest, ACallersOwnRoundingDoesNotShow) {
  const auto norm_of = [](absl::Span<const uint8_t> bytes, DType dtype, DType parameter) {
    NormStream stream;
    stream.Begin(dtype, parameter, 10);  // 1 / 10 is inexact, and nearest above
    // Blocks that come whole, one in two pieces, and a rest.
    stream.Update(bytes.subspan(0, bytes.size() / 2));
    stream.Update(bytes.subspan(bytes.size() / 2));
    return stream.Finish().sum_of_squares;
  };
  // Ordinary ones; and such that they, or their squares in double, are subnormal.
  const auto factors = [](DType dtype) {
    return std::vector<double>{1, dtype == DType::kF64 ? 1e-160 : 1e-40};
  };
  const unsigned before = _mm_getcsr();
  for (DType parameter : {DType::kF32, DType::kF64}) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
      if (dtype == DType::kF64 && parameter != DType::kF64) continue;
      for (double factor : factors(dtype)) {
        const std::vector<uint8_t> bytes = Gradient(dtype, 3 * kBlockElements + 5, factor);
        const double reference = norm_of(bytes, dtype, parameter);
        // Flush to zero, subnormals are zero; then toward zero.
        for (unsigned mode : {0x9FC0u, 0x7F80u}) {
          _mm_setcsr(mode);
          const double norm = norm_of(bytes, dtype, parameter);
          const unsigned after = _mm_getcsr();
          _mm_setcsr(before);
          EXPECT_EQ(after & ~0x3Fu, mode & ~0x3Fu) << "and is as it was, but for sticky flags";
          EXPECT_EQ(norm, reference) << DTypeName(dtype) << " for " << DTypeName(parameter)
                                     << ", factor " << factor << ", mode " << mode;
        }
      }
    }
  }
}
#endif

TEST(NormStreamTest, SeesTheOneElementThatIsNotFinite) {
  NormStream stream;
  for (size_t at : {0, 4095, 4096, 9999}) {
    std::vector<float> values(10000, 1);
    values[at] = at % 2 == 0 ? std::numeric_limits<float>::infinity() : NAN;
    const absl::Span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(values.data()),
                                          values.size() * sizeof(float));
    stream.Begin(DType::kF32, DType::kF32, 1);
    stream.Update(bytes.subspan(0, 5));
    stream.Update(bytes.subspan(5));
    EXPECT_FALSE(stream.Finish().finite) << at;
  }
}

TEST(NormStreamTest, AStepGoesByTheNormsThatCame) {
  const std::vector<uint8_t> bytes = Gradient(DType::kF32, 5000);
  OnePush push(DType::kF32, 5000);
  push.config.max_grad_norm = 1;
  EXPECT_EQ(push.Step(bytes, DType::kF32, 1, TensorNorm{16, true}).grad_norm, 4);
  const StepResult skipped = push.Step(bytes, DType::kF32, 1, TensorNorm{16, false});
  EXPECT_FALSE(skipped.applied);
  EXPECT_EQ(skipped.nonfinite, std::vector<std::string>{"p"});
}

}  // namespace
}  // namespace modelstate
