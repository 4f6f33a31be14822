#include "common/wire/values_codec.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/float_cast.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate {
namespace {

absl::Status NotRepresentable(int index, absl::string_view value, DType dtype,
                              absl::string_view why) {
  return MakeError(Reason::kNotRepresentable,
                   absl::StrCat("values[", index, "] is ", value, ", which ", DTypeName(dtype),
                                " cannot hold: ", why),
                   {{"index", absl::StrCat(index)}, {"dtype", std::string(DTypeName(dtype))}});
}

template <typename T>
void Append(T value, std::string* out) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::string RangeText(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return "its range is -2^63 to 2^63-1";
    case DType::kU64:
      return "its range is 0 to 2^64-1";
    case DType::kBool:
      return "it holds 0 and 1 only";
    default: {
      const int bits = static_cast<int>(DTypeSize(dtype)) * 8;
      const bool is_signed = dtype == DType::kI32 || dtype == DType::kI16 || dtype == DType::kI8;
      const int64_t low = is_signed ? -(int64_t{1} << (bits - 1)) : 0;
      const int64_t high = (int64_t{1} << (is_signed ? bits - 1 : bits)) - 1;
      return absl::StrCat("its range is ", low, " to ", high);
    }
  }
}

// One element of an integer dtype or BOOL from a number that is already known to be whole and to be
// `value` modulo 2^64 with the sign `negative`.
bool AppendInteger(bool negative, uint64_t value, DType dtype, std::string* out) {
  const auto fits_signed = [&](int bits) {
    const uint64_t limit = uint64_t{1} << (bits - 1);
    return negative ? -value <= limit : value < limit;
  };
  switch (dtype) {
    case DType::kI64:
      if (!fits_signed(64)) return false;
      Append(value, out);
      return true;
    case DType::kI32:
      if (!fits_signed(32)) return false;
      Append(static_cast<uint32_t>(value), out);
      return true;
    case DType::kI16:
      if (!fits_signed(16)) return false;
      Append(static_cast<uint16_t>(value), out);
      return true;
    case DType::kI8:
      if (!fits_signed(8)) return false;
      Append(static_cast<uint8_t>(value), out);
      return true;
    default:
      break;
  }
  if (negative) return false;
  switch (dtype) {
    case DType::kU64:
      Append(value, out);
      return true;
    case DType::kU32:
      if (value > std::numeric_limits<uint32_t>::max()) return false;
      Append(static_cast<uint32_t>(value), out);
      return true;
    case DType::kU16:
      if (value > std::numeric_limits<uint16_t>::max()) return false;
      Append(static_cast<uint16_t>(value), out);
      return true;
    case DType::kU8:
      if (value > std::numeric_limits<uint8_t>::max()) return false;
      Append(static_cast<uint8_t>(value), out);
      return true;
    default:  // BOOL
      if (value > 1) return false;
      Append(static_cast<uint8_t>(value), out);
      return true;
  }
}

// False when a finite value overflows.
bool AppendFloating(double value, DType dtype, std::string* out) {
  const auto narrow = static_cast<float>(value);
  float back = narrow;
  switch (dtype) {
    case DType::kF64:
      Append(value, out);
      return true;
    case DType::kF32:
    case DType::kC64:
      Append(narrow, out);
      break;
    case DType::kF16: {
      const uint16_t bits = FloatToHalf(narrow);
      back = HalfToFloat(bits);
      Append(bits, out);
      break;
    }
    case DType::kBF16: {
      const uint16_t bits = FloatToBFloat16(narrow);
      back = BFloat16ToFloat(bits);
      Append(bits, out);
      break;
    }
    case DType::kF8E4M3: {
      // There is no infinity, so one is as much out of range as 1000 is.
      const uint8_t bits = FloatToF8E4M3(narrow);
      Append(bits, out);
      return std::isnan(value) || !std::isnan(F8E4M3ToFloat(bits));
    }
    default: {  // F8_E5M2
      const uint8_t bits = FloatToF8E5M2(narrow);
      back = F8E5M2ToFloat(bits);
      Append(bits, out);
      break;
    }
  }
  return !std::isfinite(value) || std::isfinite(back);
}

bool IsReal(DType dtype) { return IsFloatingPoint(dtype) || dtype == DType::kC64; }

absl::Status EncodeDouble(int index, double value, DType dtype, std::string* out) {
  if (IsReal(dtype)) {
    if (AppendFloating(value, dtype, out)) return absl::OkStatus();
    return NotRepresentable(index, absl::StrCat(value), dtype, "it is beyond the largest");
  }
  if (!(std::trunc(value) == value) || std::isinf(value)) {
    return NotRepresentable(index, absl::StrCat(value), dtype, "it is not a whole number");
  }
  const bool negative = value < 0;
  if (value < -0x1p63 || value >= 0x1p64 ||
      !AppendInteger(negative, DoubleToUint64(value), dtype, out)) {
    return NotRepresentable(index, absl::StrCat(value), dtype, RangeText(dtype));
  }
  return absl::OkStatus();
}

absl::Status EncodeInt(int index, int64_t value, DType dtype, std::string* out) {
  if (IsReal(dtype)) {
    const auto as_double = static_cast<double>(value);
    if (as_double >= 0x1p63 || static_cast<int64_t>(as_double) != value) {
      return NotRepresentable(index, absl::StrCat(value), dtype,
                              "it is beyond 2^53 and not exact as a double; give doubles");
    }
    if (AppendFloating(as_double, dtype, out)) return absl::OkStatus();
    return NotRepresentable(index, absl::StrCat(value), dtype, "it is beyond the largest");
  }
  if (AppendInteger(value < 0, static_cast<uint64_t>(value), dtype, out)) return absl::OkStatus();
  return NotRepresentable(index, absl::StrCat(value), dtype, RangeText(dtype));
}

absl::Status CheckCount(int64_t have, int64_t want, DType dtype) {
  if (have == want) return absl::OkStatus();
  return MakeError(
      Reason::kShapeMismatch,
      absl::StrCat("there are ", have, " values, the shape has ", want,
                   dtype == DType::kC64 ? " (two for each element of C64)" : " elements"),
      {{"values", absl::StrCat(have)}, {"elements", absl::StrCat(want)}});
}

template <typename T>
T Load(absl::Span<const uint8_t> bytes, int64_t index) {
  T value;
  std::memcpy(&value, bytes.data() + static_cast<size_t>(index) * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

absl::Status EncodeValues(const v1::Values& values, DType dtype, int64_t num_elements,
                          std::string* out) {
  out->clear();
  const size_t width = DTypeSize(dtype);
  const int64_t want = dtype == DType::kC64 ? 2 * num_elements : num_elements;
  switch (values.elements_case()) {
    case v1::Values::kDoubles: {
      const auto& doubles = values.doubles().values();
      MS_RETURN_IF_ERROR(CheckCount(doubles.size(), want, dtype));
      out->reserve(static_cast<size_t>(num_elements) * width);
      for (int i = 0; i < doubles.size(); ++i) {
        MS_RETURN_IF_ERROR(EncodeDouble(i, doubles[i], dtype, out));
      }
      return absl::OkStatus();
    }
    case v1::Values::kInts: {
      const auto& ints = values.ints().values();
      MS_RETURN_IF_ERROR(CheckCount(ints.size(), want, dtype));
      out->reserve(static_cast<size_t>(num_elements) * width);
      for (int i = 0; i < ints.size(); ++i) {
        MS_RETURN_IF_ERROR(EncodeInt(i, ints[i], dtype, out));
      }
      return absl::OkStatus();
    }
    case v1::Values::kRaw: {
      const std::string& raw = values.raw();
      if (raw.size() != static_cast<uint64_t>(num_elements) * width) {
        return MakeError(
            Reason::kShapeMismatch,
            absl::StrCat("raw has ", raw.size(), " bytes, ", num_elements, " elements of ",
                         DTypeName(dtype), " have ", static_cast<uint64_t>(num_elements) * width));
      }
      if (dtype == DType::kBool) {
        for (size_t i = 0; i < raw.size(); ++i) {
          if (static_cast<uint8_t>(raw[i]) > 1) {
            return NotRepresentable(static_cast<int>(i), absl::StrCat(static_cast<uint8_t>(raw[i])),
                                    dtype, RangeText(dtype));
          }
        }
      }
      *out = raw;
      return absl::OkStatus();
    }
    case v1::Values::ELEMENTS_NOT_SET:
      break;
  }
  return MakeError(Reason::kInvalidField,
                   "values has no elements; give doubles, ints or raw: {\"doubles\": {\"values\": "
                   "[0.5, 1]}}");
}

v1::Values DecodeValues(absl::Span<const uint8_t> bytes, DType dtype) {
  v1::Values values;
  const auto count = static_cast<int64_t>(bytes.size() / DTypeSize(dtype));
  bool as_doubles = IsReal(dtype);
  if (dtype == DType::kU64) {
    for (int64_t i = 0; i < count; ++i) as_doubles |= Load<uint64_t>(bytes, i) >> 63 != 0;
  }
  if (as_doubles) {
    const int64_t numbers = dtype == DType::kC64 ? 2 * count : count;
    auto* doubles = values.mutable_doubles()->mutable_values();
    doubles->Resize(static_cast<int>(numbers), 0.0);
    const DType part = dtype == DType::kC64 ? DType::kF32 : dtype;
    CastElements(part, bytes.data(), DType::kF64,
                 reinterpret_cast<uint8_t*>(doubles->mutable_data()), numbers);
  } else {
    auto* ints = values.mutable_ints()->mutable_values();
    ints->Resize(static_cast<int>(count), 0);
    CastElements(dtype, bytes.data(), DType::kI64, reinterpret_cast<uint8_t*>(ints->mutable_data()),
                 count);
  }
  return values;
}

}  // namespace modelstate
