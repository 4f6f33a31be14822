#include "common/format/pickle_writer.h"

#include <bit>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace modelstate {
namespace {

// "FloatStorage"; nullptr: torch has none of its own.
const char* StorageClass(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "DoubleStorage";
    case DType::kF32:
      return "FloatStorage";
    case DType::kF16:
      return "HalfStorage";
    case DType::kBF16:
      return "BFloat16Storage";
    case DType::kI64:
      return "LongStorage";
    case DType::kI32:
      return "IntStorage";
    case DType::kI16:
      return "ShortStorage";
    case DType::kI8:
      return "CharStorage";
    case DType::kU8:
      return "ByteStorage";
    case DType::kBool:
      return "BoolStorage";
    case DType::kC64:
      return "ComplexFloatStorage";
    default:
      return nullptr;
  }
}

}  // namespace

void PickleWriter::Int(uint64_t value) {
  if (value < 0x100) {
    Op('K');
    Little(value, 1);
  } else if (value < 0x80000000) {
    Op('J');
    Little(value, 4);
  } else {
    Op('\x8a');
    Little(8, 1);
    Little(value, 8);
  }
}

void PickleWriter::Float(double value) {
  Op('G');
  Little(__builtin_bswap64(std::bit_cast<uint64_t>(value)), 8);
}

void PickleWriter::String(absl::string_view text) {
  if (Recall(absl::StrCat("X", text))) return;
  UniqueString(text);
  Memoize(absl::StrCat("X", text));
}

void PickleWriter::UniqueString(absl::string_view text) {
  Op('X');
  Little(text.size(), 4);
  absl::StrAppend(&text_, text);
}

void PickleWriter::Global(absl::string_view module, absl::string_view name) {
  const std::string line = absl::StrCat("c", module, "\n", name, "\n");
  if (Recall(line)) return;
  absl::StrAppend(&text_, line);
  Memoize(line);
}

void PickleWriter::Tuple(absl::Span<const uint64_t> items) {
  Op('(');
  for (uint64_t item : items) Int(item);
  Op('t');
}

void PickleWriter::OrderedDict() {
  Global("collections", "OrderedDict");
  Op(')');
  Op('R');
}

void PickleWriter::Tensor(absl::string_view key, DType dtype, const Shape& shape) {
  std::vector<uint64_t> size;
  for (int64_t dim : shape.dims()) size.push_back(static_cast<uint64_t>(dim));
  std::vector<uint64_t> stride(size.size());
  uint64_t step = 1;
  for (size_t i = size.size(); i-- > 0;) {
    stride[i] = step;
    step *= size[i] == 0 ? 1 : size[i];
  }
  const char* storage = StorageClass(dtype);
  const uint64_t elements = static_cast<uint64_t>(shape.num_elements());
  Global("torch._utils", storage != nullptr ? "_rebuild_tensor_v2" : "_rebuild_tensor_v3");
  Op('(');
  Op('(');
  String("storage");
  if (storage != nullptr) {
    Global("torch", storage);
  } else {
    Global("torch.storage", "UntypedStorage");
  }
  UniqueString(key);
  String("cpu");
  Int(storage != nullptr ? elements : elements * DTypeSize(dtype));
  Op('t');
  Op('Q');
  Int(0);
  Tuple(size);
  Tuple(stride);
  Op('\x89');
  OrderedDict();
  if (storage == nullptr) Global("torch", TorchDTypeName(dtype));
  Op('t');
  Op('R');
}

std::string PickleWriter::Finish() && {
  Op('.');
  return std::move(text_);
}

void PickleWriter::Little(uint64_t value, size_t width) {
  for (size_t i = 0; i < width; ++i) text_.push_back(static_cast<char>(value >> (8 * i)));
}

bool PickleWriter::Recall(const std::string& what) {
  const auto it = memo_.find(what);
  if (it == memo_.end()) return false;
  Op('h');
  Little(it->second, 1);
  return true;
}

void PickleWriter::Memoize(const std::string& what) {
  if (memo_.size() >= 0x100) return;
  Op('q');
  Little(memo_.size(), 1);
  memo_.emplace(what, memo_.size());
}

}  // namespace modelstate
