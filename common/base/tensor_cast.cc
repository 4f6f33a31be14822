#include "common/base/tensor_cast.h"

#include <complex>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/base/float_cast.h"

namespace modelstate {

int64_t DoubleToInt64(double value) {
  if (!(value >= -0x1p63 && value < 0x1p63)) return std::numeric_limits<int64_t>::min();
  return static_cast<int64_t>(value);
}

int32_t DoubleToInt32(double value) {
  if (!(value > -0x1.00000002p31 && value < 0x1p31)) return std::numeric_limits<int32_t>::min();
  return static_cast<int32_t>(value);
}

uint64_t DoubleToUint64(double value) {
  if (value >= 0x1p64) return 0;
  if (value >= 0x1p63) return static_cast<uint64_t>(value);
  return static_cast<uint64_t>(DoubleToInt64(value));
}

namespace {

using Complex = std::complex<float>;

// How one element lies in memory (Stored) and what it is computed with (Value).
template <typename T>
struct Plain {
  using Stored = T;
  using Value = T;
  static Value Decode(Stored stored) { return stored; }
  static Stored Encode(Value value) { return value; }
};

template <typename StoredT, float (*kDecode)(StoredT), StoredT (*kEncode)(float)>
struct Narrow {
  using Stored = StoredT;
  using Value = float;
  static Value Decode(Stored stored) { return kDecode(stored); }
  static Stored Encode(Value value) { return kEncode(value); }
};

struct Bool {
  using Stored = uint8_t;
  using Value = bool;
  static Value Decode(Stored stored) { return stored != 0; }
  static Stored Encode(Value value) { return value ? 1 : 0; }
};

template <typename To, typename From>
To Convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, bool>) {
    return value != From(0);
  } else if constexpr (std::is_same_v<From, Complex>) {
    return Convert<To>(value.real());
  } else if constexpr (std::is_same_v<To, Complex>) {
    return Complex(Convert<float>(value), 0.0f);
  } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    if constexpr (std::is_same_v<To, uint64_t>) return DoubleToUint64(value);
    if constexpr (std::is_same_v<To, int64_t>) return DoubleToInt64(value);
    if constexpr (std::is_signed_v<To>) return static_cast<To>(DoubleToInt32(value));
    return static_cast<To>(DoubleToInt64(value));
  } else {
    return static_cast<To>(value);
  }
}

template <typename From, typename To>
void CastLoop(const uint8_t* src, uint8_t* dst, int64_t count) {
  using FromStored = typename From::Stored;
  using ToStored = typename To::Stored;
  for (int64_t i = 0; i < count; ++i) {
    FromStored in;
    std::memcpy(&in, src + i * sizeof(in), sizeof(in));
    const ToStored out = To::Encode(Convert<typename To::Value>(From::Decode(in)));
    std::memcpy(dst + i * sizeof(out), &out, sizeof(out));
  }
}

// Calls `visit` with a value of the traits type of `dtype`.
template <typename Visitor>
void Visit(DType dtype, Visitor visit) {
  switch (dtype) {
    case DType::kF64:
      return visit(Plain<double>());
    case DType::kF32:
      return visit(Plain<float>());
    case DType::kF16:
      return visit(Narrow<uint16_t, HalfToFloat, FloatToHalf>());
    case DType::kBF16:
      return visit(Narrow<uint16_t, BFloat16ToFloat, FloatToBFloat16>());
    case DType::kI64:
      return visit(Plain<int64_t>());
    case DType::kI32:
      return visit(Plain<int32_t>());
    case DType::kI16:
      return visit(Plain<int16_t>());
    case DType::kI8:
      return visit(Plain<int8_t>());
    case DType::kU64:
      return visit(Plain<uint64_t>());
    case DType::kU32:
      return visit(Plain<uint32_t>());
    case DType::kU16:
      return visit(Plain<uint16_t>());
    case DType::kU8:
      return visit(Plain<uint8_t>());
    case DType::kBool:
      return visit(Bool());
    case DType::kF8E4M3:
      return visit(Narrow<uint8_t, F8E4M3ToFloat, FloatToF8E4M3>());
    case DType::kF8E5M2:
      return visit(Narrow<uint8_t, F8E5M2ToFloat, FloatToF8E5M2>());
    case DType::kC64:
      return visit(Plain<Complex>());
  }
}

}  // namespace

void CastElements(DType from, const uint8_t* src, DType to, uint8_t* dst, int64_t count) {
  if (count == 0) return;
  if (from == to) {
    std::memmove(dst, src, static_cast<size_t>(count) * DTypeSize(from));
    return;
  }
  Visit(from, [&](auto from_traits) {
    Visit(to, [&](auto to_traits) {
      CastLoop<decltype(from_traits), decltype(to_traits)>(src, dst, count);
    });
  });
}

}  // namespace modelstate
