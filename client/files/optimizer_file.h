#ifndef MODELSTATE_CLIENT_FILES_OPTIMIZER_FILE_H_
#define MODELSTATE_CLIENT_FILES_OPTIMIZER_FILE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/module_types.h"
#include "client/types.h"

// Training that moves between torch and a server, with torch.save(optimizer.state_dict()) as the
// file. torch knows a parameter by its position in the optimizer's parameters, over all groups in
// their order; a server by its name. `parameters` is everywhere what Client::ListParameters gives.
namespace modelstate::client {

struct ReadOptimizerOptions {
  // Names in the order of the positions. Empty: the names that the file has (torch's optimizers
  // that were made of named_parameters() write them); else the order of named_parameters(), where
  // it is clear which of them the file is about: those of one group, all or all trainable ones; of
  // several, those of as many groups of `current`, group by group.
  std::vector<std::string> order;
  // Unset: by the keys of the file. Refused where they say otherwise.
  std::optional<Algorithm> algorithm;
  std::optional<OptimizerInfo> current;  // of the module; unset: it has no optimizer
  // Steps so far, for a file that counts none: SGD of torch does not. Unset: 1.
  std::optional<uint64_t> step;
};

// An optimizer's state with the names of a module, in memory. Move-only; immutable.
class OptimizerFile {
 public:
  // Errors: those of CheckpointReader; INVALID_ARGUMENT INVALID_FIELD (sizes or shapes that do not
  // match, in torch's words; an algorithm that is not clear; a name twice), UNKNOWN_KEY.
  static absl::StatusOr<OptimizerFile> Read(const std::string& path,
                                            absl::Span<const TensorInfo> parameters,
                                            const ReadOptimizerOptions& options = {});

  // Algorithm and groups of the file; clipping, rounds and the rest of `current`.
  const OptimizerConfig& config() const { return config_; }
  // The largest of its parameters; unset: the file counts none.
  std::optional<uint64_t> step() const { return step_; }
  // What Client::LoadOptimizerState takes; borrows from this object. A parameter without state, or
  // of step 0, is not there.
  absl::Span<const TensorRef> refs() const { return refs_; }

 private:
  friend class OptimizerImporter;
  OptimizerFile() = default;

  OptimizerConfig config_;
  std::optional<uint64_t> step_;
  std::vector<TensorRef> refs_;
  std::unique_ptr<uint8_t[]> data_;
};

struct WriteOptimizerResult {
  uint64_t groups = 0;
  uint64_t parameters = 0;
  uint64_t tensors = 0;
  std::vector<std::string> order;  // names by position
};

// Writes `path` from a module's optimizer and its state: `state` is what a fetch with
// optimizer_state brings (tensors without a slot are passed over). `order` names parameters in the
// order that they have in torch's groups, empty for named_parameters(); those of each group keep
// it. What is in no group is left out. Master copies have no place in torch's optimizers and are
// left out too. Errors: UNKNOWN_KEY, MISSING_KEY, INVALID_FIELD; those of WriteTorchOptimizer.
absl::StatusOr<WriteOptimizerResult> WriteOptimizerFile(const std::string& path,
                                                        const OptimizerInfo& optimizer,
                                                        absl::Span<const TensorInfo> parameters,
                                                        absl::Span<const TensorRef> state,
                                                        absl::Span<const std::string> order = {});

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_OPTIMIZER_FILE_H_
