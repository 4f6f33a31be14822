#include "server/state/initializer.h"

#include <Random123/philox.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate {
namespace {

using initializer_internal::CosSin;

constexpr double kTwoToMinus53 = 1.0 / 9007199254740992.0;
constexpr uint64_t kElementsPerTask = uint64_t{1} << 14;  // even: a block is of one task
constexpr uint64_t kElementsPerCopy = uint64_t{1} << 20;  // to devices that the host cannot write

absl::Status Refuse(const TensorSpec& spec, absl::string_view text, absl::string_view way_out) {
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("tensor \"", spec.name, "\", initializer: ", text, "; ", way_out),
                   {{"tensor", spec.name}, {"field", "initializer"}});
}

absl::Status CheckFinite(const TensorSpec& spec, absl::string_view field, double value) {
  if (std::isfinite(value)) return absl::OkStatus();
  return Refuse(spec, absl::StrCat(field, " is ", value), "give a finite number");
}

// Rounds to the neighbour whose last bit is set unless `value` is a float: what is then rounded to
// a type with at most 22 bits of precision is as if rounded once.
float RoundToOdd(double value) {
  float narrow = static_cast<float>(value);
  if (static_cast<double>(narrow) == value) return narrow;
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  if (std::abs(static_cast<double>(narrow)) > std::abs(value)) --bits;  // towards zero
  bits |= 1;
  std::memcpy(&narrow, &bits, sizeof(bits));
  return narrow;
}

// `count` elements at `out`.
void Round(const double* values, size_t count, DType dtype, uint8_t* out) {
  if (DTypeSize(dtype) >= DTypeSize(DType::kF32)) {
    CastElements(DType::kF64, reinterpret_cast<const uint8_t*>(values), dtype, out,
                 static_cast<int64_t>(count));
    return;
  }
  constexpr size_t kPiece = 1024;
  float narrow[kPiece];
  for (size_t begin = 0; begin < count; begin += kPiece) {
    const size_t size = std::min(kPiece, count - begin);
    for (size_t i = 0; i < size; ++i) narrow[i] = RoundToOdd(values[begin + i]);
    CastElements(DType::kF32, reinterpret_cast<const uint8_t*>(narrow), dtype,
                 out + begin * DTypeSize(dtype), static_cast<int64_t>(size));
  }
}

absl::Status CheckHolds(const TensorSpec& spec, absl::string_view field, double value) {
  uint8_t element[sizeof(double)];
  double back = 0;
  Round(&value, 1, spec.dtype, element);
  CastElements(spec.dtype, element, DType::kF64, reinterpret_cast<uint8_t*>(&back), 1);
  if (std::isfinite(back)) return absl::OkStatus();
  return Refuse(spec, absl::StrCat(field, " is out of bounds for ", DTypeName(spec.dtype)),
                "give a bound that it holds, or another dtype");
}

// torch's _calculate_fan_in_and_fan_out.
struct Fans {
  double in = 0;
  double out = 0;
};
absl::StatusOr<Fans> CalculateFans(const TensorSpec& spec) {
  const absl::Span<const int64_t> dims = spec.shape.dims();
  if (dims.size() < 2) {
    return Refuse(spec,
                  absl::StrCat("Fan in and fan out can not be computed for tensor with fewer than "
                               "2 dimensions (its shape is ",
                               spec.shape.ToString(), ")"),
                  "use uniform, normal or a constant");
  }
  double receptive_field = 1;
  for (int64_t dim : dims.subspan(2)) receptive_field *= static_cast<double>(dim);
  return Fans{static_cast<double>(dims[1]) * receptive_field,
              static_cast<double>(dims[0]) * receptive_field};
}

// The standard deviation; 0 for a tensor without elements, where torch does nothing.
absl::StatusOr<double> KaimingStd(const Initializer& initializer, const TensorSpec& spec) {
  if (spec.shape.num_elements() == 0) return 0.0;
  MS_RETURN_IF_ERROR(CheckFinite(spec, "a", initializer.a));
  const std::string mode = absl::AsciiStrToLower(initializer.mode);
  if (mode != "fan_in" && mode != "fan_out") {
    return Refuse(
        spec,
        absl::StrCat("Mode ", mode, " not supported, please use one of ['fan_in', 'fan_out']"),
        "fan_in is the default");
  }
  MS_ASSIGN_OR_RETURN(const Fans fans, CalculateFans(spec));
  absl::StatusOr<double> gain = CalculateGain(initializer.nonlinearity, initializer.a);
  if (!gain.ok()) {
    return Annotate(gain.status(), absl::StrCat("tensor \"", spec.name, "\", initializer"));
  }
  return *gain / std::sqrt(mode == "fan_in" ? fans.in : fans.out);
}

absl::StatusOr<double> XavierStd(const Initializer& initializer, const TensorSpec& spec) {
  MS_RETURN_IF_ERROR(CheckFinite(spec, "gain", initializer.gain));
  MS_ASSIGN_OR_RETURN(const Fans fans, CalculateFans(spec));
  if (spec.shape.num_elements() == 0) return 0.0;
  return initializer.gain * std::sqrt(2.0 / (fans.in + fans.out));
}

}  // namespace

namespace initializer_internal {

PhiloxBlock Philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  const philox4x32_ctr_t counter = {
      {static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
       static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  const philox4x32_key_t words = {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}};
  const philox4x32_ctr_t block = philox4x32_R(10, counter, words);
  return {{block.v[0], block.v[1], block.v[2], block.v[3]}};
}

// x = 2^k * m with m in [sqrt(1/2), sqrt(2)), and ln m = 2 atanh(s) with s = (m - 1) / (m + 1),
// |s| < 0.1716. atanh's series s + s^3/3 + s^5/5 + ... is cut after s^21/21: what is left out is
// below 2e-17 of the sum (Abramowitz and Stegun, 4.1.27).
double Log(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // The exponent by integer arithmetic; what is drawn is never subnormal.
  auto k = static_cast<int64_t>(bits >> 52) - 1023;
  bits = (bits & ((uint64_t{1} << 52) - 1)) | (uint64_t{1023} << 52);
  double m;
  std::memcpy(&m, &bits, sizeof(m));
  constexpr double kSqrt2 = 1.4142135623730951;
  if (m >= kSqrt2) {
    m *= 0.5;
    ++k;
  }
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  double sum = 1.0 / 21;
  for (int n = 19; n >= 3; n -= 2) sum = sum * z + 1.0 / n;
  const double log_m = 2 * s + 2 * s * (z * sum);
  // ln 2 in two parts: the first has 21 trailing zero bits, so that its product with k is exact.
  constexpr double kLn2High = 0x1.62e42feep-1;
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  const auto scale = static_cast<double>(k);
  return scale * kLn2High + (scale * kLn2Low + log_m);
}

// Eighths of a turn by exact arithmetic, then Taylor's series on [0, pi/4]: the first terms left
// out are t^19/19! < 1e-19 and t^18/18! < 3e-18.
CosSin CosSinOfTurns(double turns) {
  const double eighths = turns * 8;
  const auto octant = static_cast<int>(eighths);
  const double part = eighths - octant;
  constexpr double kQuarterPi = 0.78539816339744830962;
  const double t = kQuarterPi * (octant % 2 == 0 ? part : 1 - part);
  const double z = t * t;
  double sine = 0;
  for (int n = 16; n >= 2; n -= 2) sine = (1 - sine) * (z * (1.0 / (n * (n + 1))));
  sine = t - t * sine;
  double cosine = 0;
  for (int n = 15; n >= 1; n -= 2) cosine = (1 - cosine) * (z * (1.0 / (n * (n + 1))));
  cosine = 1 - cosine;
  switch (octant) {
    case 0:
      return {cosine, sine};
    case 1:
      return {sine, cosine};
    case 2:
      return {-sine, cosine};
    case 3:
      return {-cosine, sine};
    case 4:
      return {-cosine, -sine};
    case 5:
      return {-sine, -cosine};
    case 6:
      return {sine, -cosine};
    default:
      return {cosine, -sine};
  }
}

}  // namespace initializer_internal

absl::StatusOr<double> CalculateGain(absl::string_view nonlinearity, double param) {
  for (const char* linear : {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
                             "conv_transpose2d", "conv_transpose3d", "sigmoid"}) {
    if (nonlinearity == linear) return 1.0;
  }
  if (nonlinearity == "tanh") return 5.0 / 3;
  if (nonlinearity == "relu") return std::sqrt(2.0);
  if (nonlinearity == "leaky_relu") return std::sqrt(2.0 / (1 + param * param));
  if (nonlinearity == "selu") return 3.0 / 4;
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("Unsupported nonlinearity ", nonlinearity.substr(0, 64),
                                "; use linear, conv1d and the like, sigmoid, tanh, relu, "
                                "leaky_relu or selu"),
                   {{"field", "initializer"}});
}

absl::StatusOr<Draw> ResolveInitializer(const Initializer& initializer, const TensorSpec& spec) {
  if (!IsFloatingPoint(spec.dtype)) {
    return Refuse(spec,
                  absl::StrCat("its dtype is ", DTypeName(spec.dtype),
                               "; random numbers need a floating-point dtype"),
                  "give values, zeros, ones or a constant");
  }
  Draw draw;
  bool symmetric = true;
  using Kind = Initializer::Kind;
  switch (initializer.kind) {
    case Kind::kUniform:
      symmetric = false;
      draw = {false, initializer.low, initializer.high};
      break;
    case Kind::kNormal:
      symmetric = false;
      draw = {true, initializer.mean, initializer.std};
      break;
    case Kind::kKaimingUniform:
    case Kind::kKaimingNormal: {
      MS_ASSIGN_OR_RETURN(draw.second, KaimingStd(initializer, spec));
      draw.normal = initializer.kind == Kind::kKaimingNormal;
      break;
    }
    case Kind::kXavierUniform:
    case Kind::kXavierNormal: {
      MS_ASSIGN_OR_RETURN(draw.second, XavierStd(initializer, spec));
      draw.normal = initializer.kind == Kind::kXavierNormal;
      break;
    }
  }
  if (symmetric && !draw.normal) {
    draw.second *= std::sqrt(3.0);  // bounds from the standard deviation
    draw.first = -draw.second;
  }
  MS_RETURN_IF_ERROR(CheckFinite(spec, draw.normal ? "mean" : "low", draw.first));
  MS_RETURN_IF_ERROR(CheckFinite(spec, draw.normal ? "std" : "high", draw.second));
  if (draw.normal) {
    if (draw.second < 0) {
      return Refuse(spec, absl::StrCat("normal expects std >= 0.0, but found std ", draw.second),
                    "give a standard deviation or gain that is not negative");
    }
    return draw;
  }
  if (draw.first > draw.second) {
    return Refuse(spec,
                  absl::StrCat("uniform_ expects to return a [from, to) range, but found from=",
                               draw.first, " > to=", draw.second),
                  "give low <= high, and a gain that is not negative");
  }
  MS_RETURN_IF_ERROR(CheckHolds(spec, "low", draw.first));
  MS_RETURN_IF_ERROR(CheckHolds(spec, "high", draw.second));
  MS_RETURN_IF_ERROR(CheckFinite(spec, "high - low", draw.second - draw.first));
  return draw;
}

ElementStream::ElementStream(const Draw& draw, uint64_t seed, absl::string_view name)
    : draw_(draw), seed_(seed), name_hash_(Xxh3(AsBytes(name))) {}

std::pair<double, double> ElementStream::Pair(uint64_t block) const {
  const initializer_internal::PhiloxBlock random =
      initializer_internal::Philox(seed_, block, name_hash_);
  const auto bits = [&random](size_t k) {
    return ((uint64_t{random.words[2 * k + 1]} << 32) | random.words[2 * k]) >> 11;
  };
  if (!draw_.normal) {
    const double width = draw_.second - draw_.first;
    const auto value = [&](size_t k) {
      return draw_.first + width * (static_cast<double>(bits(k)) * kTwoToMinus53);
    };
    return {value(0), value(1)};
  }
  const double radius =
      std::sqrt(-2 * initializer_internal::Log(static_cast<double>(bits(0) + 1) * kTwoToMinus53));
  const CosSin turn =
      initializer_internal::CosSinOfTurns(static_cast<double>(bits(1)) * kTwoToMinus53);
  return {draw_.first + draw_.second * (radius * turn.cos),
          draw_.first + draw_.second * (radius * turn.sin)};
}

absl::Status FillStorage(const Draw& draw, uint64_t seed, const TensorSpec& spec,
                         ComputePool& compute, TensorStorage& storage) {
  const auto elements = static_cast<uint64_t>(spec.shape.num_elements());
  const size_t width = DTypeSize(spec.dtype);
  if (storage.size() != elements * width) {
    return absl::InternalError(absl::StrCat("the storage of \"", spec.name, "\" has a wrong size"));
  }
  const ElementStream stream(draw, seed, spec.name);
  // Elements [begin, end), begin even, to `out`.
  const auto fill = [&](uint64_t begin, uint64_t end, uint8_t* out) {
    const uint64_t tasks = (end - begin + kElementsPerTask - 1) / kElementsPerTask;
    compute.ParallelFor(tasks, [&](size_t task) {
      constexpr uint64_t kPiece = 512;
      double values[kPiece];
      const uint64_t from = begin + task * kElementsPerTask;
      const uint64_t to = std::min(end, from + kElementsPerTask);
      for (uint64_t at = from; at < to; at += kPiece) {
        for (uint64_t i = 0; i < kPiece; i += 2) {
          std::tie(values[i], values[i + 1]) = stream.Pair((at + i) / 2);
        }
        Round(values, std::min(kPiece, to - at), spec.dtype, out + (at - begin) * width);
      }
    });
  };
  if (storage.device().host_visible()) {
    fill(0, elements, storage.MutableHostBytes().data());
    return absl::OkStatus();
  }
  std::vector<uint8_t> scratch(std::min(elements, kElementsPerCopy) * width);
  for (uint64_t begin = 0; begin < elements; begin += kElementsPerCopy) {
    const uint64_t end = std::min(elements, begin + kElementsPerCopy);
    fill(begin, end, scratch.data());
    MS_RETURN_IF_ERROR(storage.device().CopyFromHost(
        absl::MakeConstSpan(scratch).subspan(0, (end - begin) * width), storage.MutableBuffer(),
        begin * width));
  }
  return absl::OkStatus();
}

}  // namespace modelstate
