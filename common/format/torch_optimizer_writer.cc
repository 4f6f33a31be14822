#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdio>

#include "absl/cleanup/cleanup.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/torch_group_keys.h"
#include "common/format/torch_optimizer.h"
#include "common/format/zip_writer.h"

namespace modelstate {
namespace {

// The opcodes of pickle protocol 2 that weights_only=True takes.
class PickleWriter {
 public:
  PickleWriter() { text_ = "\x80\x02"; }

  void Op(char opcode) { text_.push_back(opcode); }

  void Int(uint64_t value) {
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

  void Float(double value) {
    Op('G');
    Little(__builtin_bswap64(std::bit_cast<uint64_t>(value)), 8);
  }

  void String(absl::string_view text) {
    if (Recall(absl::StrCat("X", text))) return;
    Op('X');
    Little(text.size(), 4);
    absl::StrAppend(&text_, text);
    Memoize(absl::StrCat("X", text));
  }

  // Not remembered, as there is no second mention of it.
  void UniqueString(absl::string_view text) {
    Op('X');
    Little(text.size(), 4);
    absl::StrAppend(&text_, text);
  }

  void Global(absl::string_view module, absl::string_view name) {
    const std::string line = absl::StrCat("c", module, "\n", name, "\n");
    if (Recall(line)) return;
    absl::StrAppend(&text_, line);
    Memoize(line);
  }

  void Tuple(absl::Span<const uint64_t> items) {
    Op('(');
    for (uint64_t item : items) Int(item);
    Op('t');
  }

  std::string Finish() && {
    Op('.');
    return std::move(text_);
  }

 private:
  void Little(uint64_t value, size_t width) {
    for (size_t i = 0; i < width; ++i) text_.push_back(static_cast<char>(value >> (8 * i)));
  }

  bool Recall(const std::string& what) {
    const auto it = memo_.find(what);
    if (it == memo_.end()) return false;
    Op('h');
    Little(it->second, 1);
    return true;
  }

  void Memoize(const std::string& what) {
    if (memo_.size() >= 0x100) return;
    Op('q');
    Little(memo_.size(), 1);
    memo_.emplace(what, memo_.size());
  }

  std::string text_;
  absl::flat_hash_map<std::string, size_t> memo_;
};

// "FloatStorage"; nullptr: torch 1.13 has none.
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
    default:
      return nullptr;
  }
}

absl::Status PickleTensor(const TorchOptimizerTensor& tensor, size_t index, PickleWriter* out) {
  const char* storage = StorageClass(tensor.dtype);
  if (storage == nullptr) {
    return MakeError(
        Reason::kNotRepresentable,
        absl::StrCat("state[", tensor.position, "][", tensor.key, "] is ", DTypeName(tensor.dtype),
                     ", which no optimizer state of torch is; cast it to F32"));
  }
  std::vector<uint64_t> size;
  for (int64_t dim : tensor.shape.dims()) size.push_back(static_cast<uint64_t>(dim));
  std::vector<uint64_t> stride(size.size());
  uint64_t step = 1;
  for (size_t i = size.size(); i-- > 0;) {
    stride[i] = step;
    step *= size[i] == 0 ? 1 : size[i];
  }
  out->Global("torch._utils", "_rebuild_tensor_v2");
  out->Op('(');
  out->Op('(');
  out->String("storage");
  out->Global("torch", storage);
  out->UniqueString(absl::StrCat(index));
  out->String("cpu");
  out->Int(static_cast<uint64_t>(tensor.shape.num_elements()));
  out->Op('t');
  out->Op('Q');
  out->Int(0);
  out->Tuple(size);
  out->Tuple(stride);
  out->Op('\x89');
  out->Global("collections", "OrderedDict");
  out->Op(')');
  out->Op('R');
  out->Op('t');
  out->Op('R');
  return absl::OkStatus();
}

// {0: {"step": tensor, ...}, ...}
absl::Status PickleState(absl::Span<const TorchOptimizerTensor> tensors, PickleWriter* out) {
  out->Op('}');
  out->Op('(');
  for (size_t i = 0; i < tensors.size();) {
    const uint64_t position = tensors[i].position;
    out->Int(position);
    out->Op('}');
    out->Op('(');
    for (; i < tensors.size() && tensors[i].position == position; ++i) {
      out->String(tensors[i].key);
      MS_RETURN_IF_ERROR(PickleTensor(tensors[i], i, out));
    }
    out->Op('u');
  }
  out->Op('u');
  return absl::OkStatus();
}

absl::Status PickleHyperparameter(absl::string_view name, const Hyperparameters& h,
                                  PickleWriter* out) {
  const HyperparameterField& field =
      *FindHyperparameter(std::string_view(name.data(), name.size()));
  if (!field.is_set(h)) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("a parameter group has no ", name, ", which torch's has"),
                     {{"field", std::string(name)}});
  }
  if (field.number != nullptr) {
    out->Float(*(h.*field.number));
  } else {
    out->Op(*(h.*field.flag) ? '\x88' : '\x89');
  }
  return absl::OkStatus();
}

absl::Status PickleGroup(Algorithm algorithm, const TorchOptimizerGroup& group, uint64_t first,
                         PickleWriter* out) {
  using Value = TorchGroupKey::Value;
  out->Op('}');
  out->Op('(');
  for (const TorchGroupKey& key : TorchGroupKeys(algorithm)) {
    out->String(key.name);
    switch (key.value) {
      case Value::kHyperparameter:
        MS_RETURN_IF_ERROR(PickleHyperparameter(key.name, group.hyperparameters, out));
        break;
      case Value::kBetas:
        MS_RETURN_IF_ERROR(PickleHyperparameter("beta1", group.hyperparameters, out));
        MS_RETURN_IF_ERROR(PickleHyperparameter("beta2", group.hyperparameters, out));
        out->Op('\x86');
        break;
      case Value::kNone:
        out->Op('N');
        break;
      case Value::kFalse:
        out->Op('\x89');
        break;
      case Value::kTrue:
        out->Op('\x88');
        break;
    }
  }
  out->String("params");
  out->Op(']');
  out->Op('(');
  for (uint64_t i = 0; i < group.size; ++i) out->Int(first + i);
  out->Op('e');
  out->Op('u');
  return absl::OkStatus();
}

absl::StatusOr<std::string> Pickle(const TorchOptimizerContent& content) {
  PickleWriter out;
  out.Op('}');
  out.Op('(');
  out.String("state");
  MS_RETURN_IF_ERROR(PickleState(content.tensors, &out));
  out.String("param_groups");
  out.Op(']');
  out.Op('(');
  uint64_t first = 0;
  for (const TorchOptimizerGroup& group : content.groups) {
    MS_RETURN_IF_ERROR(PickleGroup(content.algorithm, group, first, &out));
    first += group.size;
  }
  out.Op('e');
  out.Op('u');
  return std::move(out).Finish();
}

absl::Span<const uint8_t> Bytes(absl::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

absl::Status WriteArchive(const File& file, const TorchOptimizerContent& content,
                          TorchOptimizerBytes bytes) {
  MS_ASSIGN_OR_RETURN(const std::string pickle, Pickle(content));
  ZipWriter zip(file);
  MS_RETURN_IF_ERROR(zip.Add("archive/data.pkl", Bytes(pickle)));
  MS_RETURN_IF_ERROR(zip.Add("archive/byteorder", Bytes("little")));
  for (size_t i = 0; i < content.tensors.size(); ++i) {
    MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> elements, bytes(i));
    if (elements.size() != content.tensors[i].nbytes()) {
      return MakeError(
          Reason::kInvalidField,
          absl::StrCat("state[", content.tensors[i].position, "][", content.tensors[i].key,
                       "] has ", elements.size(), " bytes, not the ", content.tensors[i].nbytes(),
                       " of its shape and dtype"));
    }
    MS_RETURN_IF_ERROR(zip.Add(absl::StrCat("archive/data/", i), elements));
  }
  MS_RETURN_IF_ERROR(zip.Add("archive/version", Bytes("3\n")));
  return zip.Finish();
}

absl::Status SyncFolder(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const File directory(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), folder);
  if (!directory.is_open() || fsync(directory.fd()) != 0) {
    return ErrnoError(errno, absl::StrCat("sync ", folder));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteTorchOptimizer(const std::string& path, const TorchOptimizerContent& content,
                                 TorchOptimizerBytes bytes) {
  const std::string partial = path + ".partial";
  MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(partial));
  absl::Cleanup remove = [&partial] { unlink(partial.c_str()); };
  MS_RETURN_IF_ERROR(WriteArchive(file, content, bytes));
  MS_RETURN_IF_ERROR(file.SyncData());
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    return ErrnoError(errno, absl::StrCat("rename ", partial));
  }
  std::move(remove).Cancel();
  return SyncFolder(path);
}

}  // namespace modelstate
