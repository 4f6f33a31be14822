#include "client/files/tensor_file.h"

#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/open_path.h"

namespace modelstate::client {
absl::StatusOr<TensorFile> TensorFile::Read(const std::string& path) {
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader, OpenCheckpointPath(path));
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

}  // namespace modelstate::client
