#include "common/base/dtype.h"

namespace modelstate {
namespace {

struct Row {
  DType dtype;
  uint8_t size;
  bool floating;
  const char* name;
  const char* torch_name;
};

constexpr Row kRows[] = {
    {DType::kF64, 8, true, "F64", "float64"},
    {DType::kF32, 4, true, "F32", "float32"},
    {DType::kF16, 2, true, "F16", "float16"},
    {DType::kBF16, 2, true, "BF16", "bfloat16"},
    {DType::kI64, 8, false, "I64", "int64"},
    {DType::kI32, 4, false, "I32", "int32"},
    {DType::kI16, 2, false, "I16", "int16"},
    {DType::kI8, 1, false, "I8", "int8"},
    {DType::kU64, 8, false, "U64", "uint64"},
    {DType::kU32, 4, false, "U32", "uint32"},
    {DType::kU16, 2, false, "U16", "uint16"},
    {DType::kU8, 1, false, "U8", "uint8"},
    {DType::kBool, 1, false, "BOOL", "bool"},
    {DType::kF8E4M3, 1, true, "F8_E4M3", "float8_e4m3fn"},
    {DType::kF8E5M2, 1, true, "F8_E5M2", "float8_e5m2"},
    {DType::kC64, 8, false, "C64", "complex64"},
};

const Row& Find(DType dtype) { return kRows[static_cast<size_t>(dtype) - 1]; }

}  // namespace

size_t DTypeSize(DType dtype) { return Find(dtype).size; }

absl::string_view DTypeName(DType dtype) { return Find(dtype).name; }

std::optional<DType> ParseDType(absl::string_view name) {
  for (const Row& row : kRows) {
    if (name == row.name) return row.dtype;
  }
  return std::nullopt;
}

absl::string_view TorchDTypeName(DType dtype) { return Find(dtype).torch_name; }

bool IsFloatingPoint(DType dtype) { return Find(dtype).floating; }

bool CanRequireGrad(DType dtype) { return IsFloatingPoint(dtype) || dtype == DType::kC64; }

}  // namespace modelstate
