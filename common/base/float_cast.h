#ifndef MODELSTATE_COMMON_BASE_FLOAT_CAST_H_
#define MODELSTATE_COMMON_BASE_FLOAT_CAST_H_

#include <bit>
#include <cstdint>

namespace modelstate {

// The narrow floating types as PyTorch converts them: to nearest, ties to even; subnormals are
// kept. Every function is pure and independent of the instruction set.
//
//   type       overflow          NaN becomes
//   F16        infinity          quiet NaN 0x7E00 with the sign
//   BF16       infinity          0x7FC0
//   F8_E5M2    infinity          0x7F with the sign
//   F8_E4M3    NaN (no infinity) 0x7F with the sign

namespace float_cast_internal {

// Rounds |x| to a multiple of the last place of `magic`, a power of two: the addition does it. Used
// for results that are subnormal, where that place is the smallest subnormal of the narrow type.
constexpr uint32_t RoundToUlpOf(float magic, uint32_t magnitude_bits) {
  return std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude_bits) + magic) -
         std::bit_cast<uint32_t>(magic);
}

}  // namespace float_cast_internal

constexpr uint16_t FloatToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65536
  if (magnitude < 0x38800000u) {                                               // 2^-14
    return static_cast<uint16_t>(sign | float_cast_internal::RoundToUlpOf(0.5f, magnitude));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

constexpr float HalfToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  const uint32_t mantissa = half & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

constexpr uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float BFloat16ToFloat(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

constexpr uint8_t FloatToF8E4M3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x43F00000u) return static_cast<uint8_t>(sign | 0x7Fu);  // 480
  if (magnitude < 0x3C800000u) {                                            // 2^-6
    return static_cast<uint8_t>(sign | float_cast_internal::RoundToUlpOf(16384.0f, magnitude));
  }
  const uint32_t rounded = magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23);
  return static_cast<uint8_t>(sign | (rounded >> 20));
}

constexpr float F8E4M3ToFloat(uint8_t value) {
  const uint32_t sign = (value & 0x80u) << 24;
  const uint32_t exponent = (value >> 3) & 0xFu;
  const uint32_t mantissa = value & 0x7u;
  if ((value & 0x7Fu) == 0x7Fu) return std::bit_cast<float>(sign | 0x7FC00000u);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((exponent + 120) << 23) | (mantissa << 20));
}

constexpr uint8_t FloatToF8E5M2(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (magnitude >= 0x47800000u) return static_cast<uint8_t>(sign | 0x7Cu);  // 65536
  if (magnitude < 0x38800000u) {                                            // 2^-14
    return static_cast<uint8_t>(sign | float_cast_internal::RoundToUlpOf(128.0f, magnitude));
  }
  const uint32_t rounded = magnitude + 0xFFFFFu + ((magnitude >> 21) & 1u) - (112u << 23);
  return static_cast<uint8_t>(sign | (rounded >> 21));
}

constexpr float F8E5M2ToFloat(uint8_t value) {
  return HalfToFloat(static_cast<uint16_t>(value << 8));
}

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_FLOAT_CAST_H_
