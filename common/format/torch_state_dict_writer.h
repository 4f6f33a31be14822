#ifndef MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_WRITER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_WRITER_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/tensor_spec.h"

namespace modelstate {

// Elements of specs[index], row-major and little-endian; used until the next call.
using TensorBytes = absl::FunctionRef<absl::StatusOr<absl::Span<const uint8_t>>(size_t index)>;

// Writes into the empty `file` what torch.save(module.state_dict()) writes, as far as it is known:
// an OrderedDict of plain tensors in the order of `specs`, tied names on one storage, and the
// modules' versions as its `_metadata`. torch.load(weights_only=True) reads it. One tensor at a
// time: `bytes` is called once for each that is not tied to another, in order.
// INVALID_ARGUMENT NOT_REPRESENTABLE for a name that is not UTF-8; STORAGE_FULL, STORAGE_ERROR;
// those of `bytes`.
absl::Status WriteTorchStateDict(const File& file, absl::Span<const TensorSpec> specs,
                                 const std::map<std::string, int64_t>& module_versions,
                                 TensorBytes bytes);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_WRITER_H_
