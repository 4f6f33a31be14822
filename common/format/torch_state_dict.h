#ifndef MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/pickle.h"

namespace modelstate {

// Where the elements of a pickled tensor lie in its storage. Offsets and strides count elements.
struct TensorView {
  std::string storage_key;
  uint64_t storage_bytes = 0;  // as the pickle says
  uint64_t offset = 0;
  // One per dimension; 0 for dimensions of size 0 or 1, whose stride means nothing.
  absl::InlinedVector<uint64_t, 4> strides;
  bool conjugate = false;  // the elements are the complex conjugates of the stored ones
  bool negate = false;     // ... the negatives ...
};

struct TorchTensor {
  StoredTensor tensor;
  TensorView view;
};

// A state_dict of a pickle.
struct TorchStateDict {
  std::vector<TorchTensor> tensors;
  std::map<std::string, int64_t> module_versions;  // CheckpointReader::module_versions
};

// Finds the state_dict in what `data.pkl` describes and reads its tensors, in order. Checks that
// every view lies in its storage, with checked arithmetic, and that expanded views do not grow the
// tensors without bound. Marks later names of the same view as aliases. Its `_metadata` is taken as
// far as it is what PyTorch writes; anything else in it is passed over.
absl::StatusOr<TorchStateDict> ExtractStateDict(const PickleTree& tree,
                                                absl::string_view state_dict_key);

// The parts of it, for tensors that lie elsewhere.
//
// Whether a node is a call that makes a tensor.
bool IsTorchTensor(const PickleTree& tree, PickleTree::Id id);
// REQUIRES: IsTorchTensor. Its view is checked; `name` is what messages call it.
absl::StatusOr<TorchTensor> ExtractTensor(const PickleTree& tree, PickleTree::Id id,
                                          std::string name);
// The limit on what expanded views take together.
absl::Status CheckTensorTotals(absl::Span<const TorchTensor> tensors);
// The value of a string key of a dict, the last one as in Python; nullopt when there is none.
std::optional<PickleTree::Id> LookupKey(const PickleTree& tree, PickleTree::Id dict,
                                        absl::string_view key);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_STATE_DICT_H_
