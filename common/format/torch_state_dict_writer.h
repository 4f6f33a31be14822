#ifndef MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_WRITER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_WRITER_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/tensor_spec.h"
#include "common/format/zip_writer.h"

namespace modelstate {

// Gives the elements of specs[index], row-major and little-endian, to `take`, in pieces and in
// order.
using GiveElements = absl::FunctionRef<absl::Status(size_t index, ZipWriter::TakeBytes take)>;

// Writes into the empty `file` what torch.save(module.state_dict()) writes, as far as it is known:
// an OrderedDict of plain tensors in the order of `specs`, tied names on one storage, and the
// modules' versions as its `_metadata`. torch.load(weights_only=True) reads it. `give` is called
// once for each tensor that is not tied to another, in order.
// INVALID_ARGUMENT NOT_REPRESENTABLE for a name that is not UTF-8; STORAGE_FULL, STORAGE_ERROR;
// those of `give`.
absl::Status WriteTorchStateDict(const File& file, absl::Span<const TensorSpec> specs,
                                 const std::map<std::string, int64_t>& module_versions,
                                 GiveElements give);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_WRITER_H_
