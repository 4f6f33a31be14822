#ifndef MODELSTATE_COMMON_BASE_DTYPE_H_
#define MODELSTATE_COMMON_BASE_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"

namespace modelstate {

// Element types of the safetensors format whose width is a whole number of bytes and that PyTorch
// has too. The numbers are those of `modelstate.v1.DType` on the wire.
enum class DType : uint8_t {
  kF64 = 1,
  kF32 = 2,
  kF16 = 3,
  kBF16 = 4,
  kI64 = 5,
  kI32 = 6,
  kI16 = 7,
  kI8 = 8,
  kU64 = 9,
  kU32 = 10,
  kU16 = 11,
  kU8 = 12,
  kBool = 13,
  kF8E4M3 = 14,
  kF8E5M2 = 15,
  kC64 = 16,
};

inline constexpr DType kAllDTypes[] = {DType::kF64,  DType::kF32,    DType::kF16,    DType::kBF16,
                                       DType::kI64,  DType::kI32,    DType::kI16,    DType::kI8,
                                       DType::kU64,  DType::kU32,    DType::kU16,    DType::kU8,
                                       DType::kBool, DType::kF8E4M3, DType::kF8E5M2, DType::kC64};

// Bytes of one element: 1, 2, 4 or 8.
size_t DTypeSize(DType dtype);

// The name that a safetensors header uses: "F32", "BOOL", "F8_E4M3".
absl::string_view DTypeName(DType dtype);

// The inverse of DTypeName; nullopt for any other text.
std::optional<DType> ParseDType(absl::string_view name);

// The name that PyTorch prints, without "torch.": "float32", "bool", "float8_e4m3fn".
absl::string_view TorchDTypeName(DType dtype);

// Real floating types: what `.to(dtype)` casts and what an optimizer can update.
bool IsFloatingPoint(DType dtype);

// Whether autograd could produce a gradient of this type: floating point and complex.
bool CanRequireGrad(DType dtype);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_DTYPE_H_
