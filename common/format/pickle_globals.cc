#include "common/format/pickle_globals.h"

namespace modelstate {
namespace {

using G = PickleGlobal;

constexpr PickleGlobalRow kGlobals[] = {
    {"collections OrderedDict", G::kOrderedDict, {}},
    {"collections Counter", G::kCounter, {}},
    {"__builtin__ set", G::kSet, {}},
    {"builtins set", G::kSet, {}},
    {"__builtin__ complex", G::kComplex, {}},
    {"builtins complex", G::kComplex, {}},
    {"__builtin__ bytearray", G::kByteArray, {}},
    {"builtins bytearray", G::kByteArray, {}},
    {"_codecs encode", G::kCodecsEncode, {}},
    {"torch._utils _rebuild_tensor", G::kRebuildTensor, {}},
    {"torch._utils _rebuild_tensor_v2", G::kRebuildTensorV2, {}},
    {"torch._utils _rebuild_tensor_v3", G::kRebuildTensorV3, {}},
    {"torch._utils _rebuild_parameter", G::kRebuildParameter, {}},
    {"torch._utils _rebuild_parameter_with_state", G::kRebuildParameterWithState, {}},
    {"torch._tensor _rebuild_from_type_v2", G::kRebuildFromType, {}},
    {"torch Tensor", G::kTensorClass, {}},
    {"torch.nn.parameter Parameter", G::kParameterClass, {}},
    {"torch Size", G::kSize, {}},
    {"torch device", G::kDevice, {}},
    {"torch.storage UntypedStorage", G::kUntypedStorage, {}, "untyped"},
    {"torch UntypedStorage", G::kUntypedStorage, {}, "untyped"},
    {"torch DoubleStorage", G::kStorage, DType::kF64, "float64"},
    {"torch FloatStorage", G::kStorage, DType::kF32, "float32"},
    {"torch HalfStorage", G::kStorage, DType::kF16, "float16"},
    {"torch BFloat16Storage", G::kStorage, DType::kBF16, "bfloat16"},
    {"torch LongStorage", G::kStorage, DType::kI64, "int64"},
    {"torch IntStorage", G::kStorage, DType::kI32, "int32"},
    {"torch ShortStorage", G::kStorage, DType::kI16, "int16"},
    {"torch CharStorage", G::kStorage, DType::kI8, "int8"},
    {"torch ByteStorage", G::kStorage, DType::kU8, "uint8"},
    {"torch BoolStorage", G::kStorage, DType::kBool, "bool"},
    {"torch ComplexFloatStorage", G::kStorage, DType::kC64, "complex64"},
    {"torch ComplexDoubleStorage", G::kStorage, {}, "complex128", 16},
    {"torch QInt8Storage", G::kStorage, {}, "qint8"},
    {"torch QUInt8Storage", G::kStorage, {}, "quint8"},
    {"torch QInt32Storage", G::kStorage, {}, "qint32", 4},
    {"torch float64", G::kDType, DType::kF64, "float64"},
    {"torch float32", G::kDType, DType::kF32, "float32"},
    {"torch float16", G::kDType, DType::kF16, "float16"},
    {"torch bfloat16", G::kDType, DType::kBF16, "bfloat16"},
    {"torch int64", G::kDType, DType::kI64, "int64"},
    {"torch int32", G::kDType, DType::kI32, "int32"},
    {"torch int16", G::kDType, DType::kI16, "int16"},
    {"torch int8", G::kDType, DType::kI8, "int8"},
    {"torch uint64", G::kDType, DType::kU64, "uint64"},
    {"torch uint32", G::kDType, DType::kU32, "uint32"},
    {"torch uint16", G::kDType, DType::kU16, "uint16"},
    {"torch uint8", G::kDType, DType::kU8, "uint8"},
    {"torch bool", G::kDType, DType::kBool, "bool"},
    {"torch float8_e4m3fn", G::kDType, DType::kF8E4M3, "float8_e4m3fn"},
    {"torch float8_e5m2", G::kDType, DType::kF8E5M2, "float8_e5m2"},
    {"torch float8_e4m3fnuz", G::kDType, {}, "float8_e4m3fnuz"},
    {"torch float8_e5m2fnuz", G::kDType, {}, "float8_e5m2fnuz"},
    {"torch float8_e8m0fnu", G::kDType, {}, "float8_e8m0fnu"},
    {"torch float4_e2m1fn_x2", G::kDType, {}, "float4_e2m1fn_x2"},
    {"torch complex64", G::kDType, DType::kC64, "complex64"},
    {"torch complex128", G::kDType, {}, "complex128"},
    {"torch complex32", G::kDType, {}, "complex32"},
};

}  // namespace

absl::Span<const PickleGlobalRow> PickleGlobals() { return kGlobals; }

}  // namespace modelstate
