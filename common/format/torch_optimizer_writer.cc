#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/format/pickle_writer.h"
#include "common/format/torch_group_keys.h"
#include "common/format/torch_optimizer.h"
#include "common/format/zip_writer.h"

namespace modelstate {
namespace {

absl::Status PickleTensor(const TorchOptimizerTensor& tensor, size_t index, PickleWriter* out) {
  const bool known =
      tensor.dtype == DType::kI64 || (IsFloatingPoint(tensor.dtype) && DTypeSize(tensor.dtype) > 1);
  if (!known) {
    return MakeError(
        Reason::kNotRepresentable,
        absl::StrCat("state[", tensor.position, "][", tensor.key, "] is ", DTypeName(tensor.dtype),
                     ", which no optimizer state of torch is; cast it to F32"));
  }
  out->Tensor(absl::StrCat(index), tensor.dtype, tensor.shape);
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

absl::Status WriteArchive(const File& file, const TorchOptimizerContent& content,
                          TorchOptimizerBytes bytes) {
  MS_ASSIGN_OR_RETURN(const std::string pickle, Pickle(content));
  ZipWriter zip(file);
  MS_RETURN_IF_ERROR(zip.Add("archive/data.pkl", AsBytes(pickle)));
  MS_RETURN_IF_ERROR(zip.Add("archive/byteorder", AsBytes("little")));
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
  MS_RETURN_IF_ERROR(zip.Add("archive/version", AsBytes("3\n")));
  return zip.Finish();
}

}  // namespace

absl::Status WriteTorchOptimizer(const std::string& path, const TorchOptimizerContent& content,
                                 TorchOptimizerBytes bytes) {
  const std::string partial = path + ".partial";
  MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(partial, path));
  absl::Cleanup remove = [&partial] { unlink(partial.c_str()); };
  MS_RETURN_IF_ERROR(WriteArchive(file, content, bytes));
  MS_RETURN_IF_ERROR(file.SyncData());
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    return ErrnoError(errno, absl::StrCat("rename ", partial, " to ", path));
  }
  std::move(remove).Cancel();
  return SyncFolderOf(path);
}

}  // namespace modelstate
