#include "client/files/tensor_file.h"

#include <cstring>
#include <map>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"

namespace modelstate::client {
namespace {

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenPath(const std::string& path) {
  MS_ASSIGN_OR_RETURN(File file, OpenForRead(path));
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = OpenCheckpoint(std::move(file));
  if (!reader.ok()) return Annotate(reader.status(), path);
  return reader;
}

absl::StatusOr<std::string> Compare(const CheckpointReader& a, size_t index_a,
                                    const CheckpointReader& b, size_t index_b) {
  const StoredTensor& tensor_a = a.tensors()[index_a];
  const StoredTensor& tensor_b = b.tensors()[index_b];
  if (tensor_a.dtype != tensor_b.dtype) {
    return absl::StrCat("dtype ", DTypeName(tensor_a.dtype), " and ", DTypeName(tensor_b.dtype));
  }
  if (tensor_a.shape != tensor_b.shape) {
    return absl::StrCat("shape ", tensor_a.shape.ToString(), " and ", tensor_b.shape.ToString());
  }
  std::vector<uint8_t> bytes_a(tensor_a.nbytes());
  std::vector<uint8_t> bytes_b(tensor_b.nbytes());
  MS_RETURN_IF_ERROR(a.Read(index_a, absl::MakeSpan(bytes_a)));
  MS_RETURN_IF_ERROR(b.Read(index_b, absl::MakeSpan(bytes_b)));
  if (bytes_a == bytes_b) return std::string();
  uint64_t different = 0;
  for (size_t i = 0; i < bytes_a.size(); ++i) different += bytes_a[i] != bytes_b[i] ? 1 : 0;
  return absl::StrCat(different, " of ", bytes_a.size(), " bytes differ");
}

}  // namespace

absl::StatusOr<TensorFile> TensorFile::Read(const std::string& path) {
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader, OpenPath(path));
  TensorFile result;
  uint64_t total = 0;
  for (const StoredTensor& tensor : reader->tensors()) {
    Entry entry;
    entry.spec.name = tensor.name;
    entry.spec.dtype = tensor.dtype;
    entry.spec.shape = tensor.shape;
    entry.spec.alias_of = tensor.alias_of;
    entry.spec.kind = tensor.kind.value_or(TensorKind::kParameter);
    entry.spec.requires_grad = tensor.requires_grad.value_or(true);
    entry.has_kind = tensor.kind.has_value();
    entry.offset = total;
    if (!entry.spec.is_alias()) total += entry.spec.nbytes();
    result.entries_.push_back(std::move(entry));
  }
  result.data_.reset(new (std::nothrow) uint8_t[total]);
  if (result.data_ == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for the ", total, " bytes of ", path));
  }
  for (size_t i = 0; i < result.entries_.size(); ++i) {
    const Entry& entry = result.entries_[i];
    if (entry.spec.is_alias()) continue;
    MS_RETURN_IF_ERROR(
        reader->Read(i, absl::MakeSpan(result.data_.get() + entry.offset, entry.spec.nbytes())));
  }
  return result;
}

std::vector<TensorRef> TensorFile::refs(TensorKind default_kind) const {
  std::vector<TensorRef> refs;
  refs.reserve(entries_.size());
  for (const Entry& entry : entries_) {
    TensorRef ref;
    ref.spec = entry.spec;
    if (!entry.has_kind) ref.spec.kind = default_kind;
    if (!entry.spec.is_alias()) {
      ref.bytes = absl::MakeConstSpan(data_.get() + entry.offset, entry.spec.nbytes());
    }
    refs.push_back(std::move(ref));
  }
  return refs;
}

absl::StatusOr<FileComparison> CompareTensorFiles(const std::string& a, const std::string& b) {
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader_a, OpenPath(a));
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader_b, OpenPath(b));
  std::map<std::string, size_t> in_b;
  for (size_t i = 0; i < reader_b->tensors().size(); ++i) {
    in_b.emplace(reader_b->tensors()[i].name, i);
  }
  FileComparison comparison;
  for (size_t i = 0; i < reader_a->tensors().size(); ++i) {
    const std::string& name = reader_a->tensors()[i].name;
    const auto it = in_b.find(name);
    if (it == in_b.end()) {
      comparison.differences.push_back({name, absl::StrCat("only in ", a)});
      continue;
    }
    MS_ASSIGN_OR_RETURN(std::string what, Compare(*reader_a, i, *reader_b, it->second));
    if (what.empty()) {
      ++comparison.equal;
    } else {
      comparison.differences.push_back({name, std::move(what)});
    }
    in_b.erase(it);
  }
  for (const auto& [name, index] : in_b) {
    comparison.differences.push_back({name, absl::StrCat("only in ", b)});
  }
  return comparison;
}

}  // namespace modelstate::client
