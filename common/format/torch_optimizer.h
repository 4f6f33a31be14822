#ifndef MODELSTATE_COMMON_FORMAT_TORCH_OPTIMIZER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_OPTIMIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "common/base/file.h"
#include "common/base/hyperparameters.h"
#include "common/base/shape.h"
#include "common/format/torch_tensor_reader.h"

// What `torch.save(optimizer.state_dict(), path)` writes. There a parameter is a position: its
// place in the parameters of all groups, one group after the other, counted from 0.
namespace modelstate {

struct TorchOptimizerGroup {
  Hyperparameters hyperparameters;
  uint64_t size = 0;                         // parameters
  std::vector<std::string> parameter_names;  // "param_names"; empty: it has none
};

// One value of a parameter's state.
struct TorchOptimizerTensor {
  uint64_t position = 0;
  std::string key;  // "exp_avg"
  DType dtype = DType::kF32;
  Shape shape;

  uint64_t nbytes() const { return static_cast<uint64_t>(shape.num_elements()) * DTypeSize(dtype); }
};

// A file as it is read. Nothing in it is executed. Immutable; Read is thread-safe.
class TorchOptimizerFile {
 public:
  // Finds the state of the optimizer at the top level, or else under one of the keys that training
  // scripts save it by ("optimizer", "optimizer_state_dict", ...). Hyper-parameters may be tensors
  // of one element; keys of a group that are none of ours (foreach, initial_lr) are passed over.
  // Errors are those of CheckpointReader.
  static absl::StatusOr<TorchOptimizerFile> Open(File file);

  absl::Span<const TorchOptimizerGroup> groups() const { return groups_; }
  uint64_t parameter_count() const;  // of all groups
  // In the order of the file. What the file has as a Python number, as old versions keep `step`, is
  // a 0-dim F64 here; what it has as None is left out.
  absl::Span<const TorchOptimizerTensor> tensors() const { return tensors_; }
  // The elements of tensors()[index], row-major and little-endian, to `out` of its nbytes().
  absl::Status Read(size_t index, absl::Span<uint8_t> out) const;

  // Which optimizer wrote the file, by the keys of its groups and of its state. Of older
  // torch nothing tells Adam from AdamW: it is Adam where there is no weight decay, in which
  // case they are the same. INVALID_ARGUMENT INVALID_FIELD where it is not clear, or none of ours.
  absl::StatusOr<Algorithm> GuessAlgorithm() const;
  // Whether it can be of `algorithm`, as somebody says. INVALID_ARGUMENT INVALID_FIELD where the
  // keys are those of another of torch's optimizers. An optimizer that is not torch's may have the
  // keys of any that is; of RAdam, which has none of its own, torch's have `foreach`.
  absl::Status CheckAlgorithm(Algorithm algorithm) const;

 private:
  friend class TorchOptimizerParser;
  // Of tensors_[i]: the place in reader_, or the number itself.
  struct Source {
    size_t index = 0;
    std::optional<double> number;
  };

  TorchOptimizerFile() = default;
  bool HasGroupKey(absl::string_view key) const;
  bool HasStateKey(absl::string_view key) const;
  bool Decays() const;  // by a weight_decay that is not 0

  std::vector<TorchOptimizerGroup> groups_;
  std::vector<std::string> group_keys_;  // of the first group
  std::vector<TorchOptimizerTensor> tensors_;
  std::vector<Source> sources_;
  std::unique_ptr<TorchTensorReader> reader_;
};

// What torch's optimizer of this algorithm has of `h`; the rest is left out.
Hyperparameters TorchHyperparameters(Algorithm algorithm, const Hyperparameters& h);

// What is to be written.
struct TorchOptimizerContent {
  Algorithm algorithm = Algorithm::kUnknown;
  std::vector<TorchOptimizerGroup> groups;    // their hyper-parameters complete
  std::vector<TorchOptimizerTensor> tensors;  // by position, ascending
};

// Elements of content.tensors[index], row-major and little-endian; used until the next call.
using TorchOptimizerBytes = absl::FunctionRef<absl::StatusOr<absl::Span<const uint8_t>>(size_t)>;

// Writes a file that torch.load(path, weights_only=True) reads and load_state_dict of the optimizer
// takes, torch 1.13 to 2.15, one tensor at a time: to `path`.partial, which is synced and renamed.
// On an error `path` is as before. `bytes` is called once for each tensor, in order.
// INVALID_ARGUMENT INVALID_FIELD for a hyper-parameter that the algorithm has and a group lacks;
// RESOURCE_EXHAUSTED STORAGE_FULL, INTERNAL STORAGE_ERROR; those of `bytes`.
absl::Status WriteTorchOptimizer(const std::string& path, const TorchOptimizerContent& content,
                                 TorchOptimizerBytes bytes);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_OPTIMIZER_H_
