#ifndef MODELSTATE_CLIENT_TYPES_H_
#define MODELSTATE_CLIENT_TYPES_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/module_types.h"
#include "common/base/optimizer_config.h"
#include "common/base/selection.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"

// What transfers, steps and checkpoints take and give, as plain values. The meaning of each field
// is that of the field of the same name in proto/modelstate/v1, where it is documented. All sizes
// are bytes.
namespace modelstate::client {

using modelstate::Algorithm;
using modelstate::GroupOverride;
using modelstate::Hyperparameters;
using modelstate::OptimizerConfig;
using modelstate::ParameterGroup;

struct ParameterGroupInfo {
  std::string name;
  uint64_t parameter_count = 0;
  Hyperparameters hyperparameters;
};

// A round that waits for contributions.
struct OpenRound {
  std::vector<std::string> workers;  // the first 100 in name order
  uint32_t contributions = 0;
  uint64_t staged_bytes = 0;
  absl::Time open_time;
};

struct OptimizerInfo {
  OptimizerConfig config;
  std::vector<ParameterGroupInfo> groups;
  uint64_t step = 0;
  uint64_t state_bytes = 0;
  Version version;
  uint64_t ungrouped_count = 0;
  std::vector<std::string> ungrouped;  // the first 10
  uint64_t dropped_count = 0;
  std::vector<std::string> dropped;  // the first 10: "exp_avg/layer1.weight"
  std::optional<OpenRound> round;
  uint64_t round_memory_bytes = 0;
  uint64_t worker_count = 0;
};

// A tensor to send; of optimizer state with spec.slot, and the parameter's name. `bytes` are its
// elements, contiguous, row-major and little-endian, and borrowed: unchanged and valid until the
// call that takes it returns. For an alias they are empty.
struct TensorRef {
  TensorSpec spec;
  absl::Span<const uint8_t> bytes;
};

struct StepOptions {
  // Names the step: then a repeat, also by the client's own retries, is applied once. Both or
  // neither; without them a call that fails in transport is not tried again.
  std::string worker;
  uint64_t sequence = 0;
  std::optional<Version> base;
  double weight = 1;  // in a round's mean
  std::optional<double> grad_scale;
  std::vector<GroupOverride> overrides;
  bool wait = false;
  bool ignore_frozen = false;  // leave out gradients of frozen parameters
  // Keep these gradients for this worker's next step. Needs worker and sequence.
  bool accumulate = false;
  // How many pushes of this worker were accumulated before this one, for the server to check.
  std::optional<uint32_t> accumulated;
  bool digests = true;  // send XXH3 of each tensor, for the server to check
  // It may have been sent before: ask by the header alone first.
  bool resend = false;
};

enum class StepOutcome {
  kUnknown = 0,
  kApplied = 1,
  kPending = 2,
  kSkippedNonfinite = 3,
  kAccumulated = 4
};

struct StepResult {
  StepOutcome outcome = StepOutcome::kUnknown;
  bool replayed = false;
  Version version;
  uint64_t step = 0;
  uint32_t contributions = 0;
  uint32_t quorum = 0;
  double grad_norm = 0;
  double clip_coef = 0;
  std::vector<std::string> nonfinite;
  uint64_t updated = 0;
  uint64_t skipped = 0;
  uint64_t ignored = 0;
  uint32_t accumulated = 0;
};

struct LoadOptions {
  bool strict = true;
  bool assign = false;
  std::string strip_prefix;
  std::string add_prefix;
  std::vector<std::string> buffers;
  // Decide and report, and change nothing. The lists of the result are then complete.
  bool dry_run = false;
};

struct KindDecision {
  std::string rule;
  uint64_t parameters = 0;
  uint64_t buffers = 0;
};

struct LoadResult {
  ModuleInfo module;
  std::vector<KindDecision> decisions;
  std::vector<std::string> missing_keys;
  std::vector<std::string> unexpected_keys;
  uint64_t missing_count = 0;
  uint64_t unexpected_count = 0;
  uint64_t loaded = 0;
  std::vector<std::string> size_mismatches;  // dry_run only
  uint64_t size_mismatch_count = 0;
};

// All of an optimizer's state: LoadOptimizerState in proto/modelstate/v1/step.proto.
struct LoadOptimizerStateOptions {
  std::optional<OptimizerConfig> optimizer;  // configured together with the state
  std::optional<Version> base;
  std::optional<uint64_t> step;  // of the module
  bool digests = true;           // send XXH3 of each tensor, for the server to check
};

struct Progress {
  std::string phase;
  uint64_t done_bytes = 0;
  uint64_t total_bytes = 0;
};
using ProgressCallback = std::function<void(const Progress&)>;

struct LoadCheckpointOptions {
  LoadOptions load;
  bool create_module = false;
  std::string state_dict_key;
  bool weights_only = false;
};

struct LoadCheckpointResult {
  LoadResult load;
  std::string format;
  bool optimizer_loaded = false;
  uint64_t read_bytes = 0;
  std::string path;  // what was loaded; the one that "latest" was
};

struct SaveCheckpointOptions {
  bool overwrite = false;
  bool weights_only = false;
};

struct CheckpointFile {
  std::string name;
  uint64_t nbytes = 0;
};

struct CheckpointInfo {
  std::string path;
  std::string format;
  uint64_t nbytes = 0;
  absl::Time create_time;
  std::string module;
  Version version;
  uint64_t step = 0;
  uint64_t tensor_count = 0;
  bool has_optimizer = false;
  bool weights_only = false;
  std::vector<CheckpointFile> files;
  std::optional<bool> verified;
  uint64_t unverifiable_tensors = 0;  // read for that, with no digest or checksum in the file
  std::string problem;
};

struct FetchOptions {
  Selection selection;
  // Neither: the newest. At most one of them.
  uint64_t version = 0;
  std::string snapshot_id;
  // When this is the current version, nothing is sent and `not_modified` is set.
  std::optional<Version> if_newer_than;
  // Only tensors that were written after this version, for a caller that keeps a copy (see
  // Client::Follow); `layout_digest` is then that of its copy. Not with optimizer_state.
  std::optional<Version> changed_since;
  // When not empty: LAYOUT_MISMATCH where the selection's layout is another.
  std::string layout_digest;
  // The optimizer state of the selected parameters follows the state_dict, with spec.slot.
  bool optimizer_state = false;
  uint32_t chunk_bytes = 0;  // 0: the server chooses
  bool digests = true;       // verify the XXH3 of every tensor
  ProgressCallback progress;
};

struct FollowOptions {
  Selection selection;
  uint32_t chunk_bytes = 0;  // 0: the server chooses
  bool digests = true;       // verify the XXH3 of every tensor that comes
};

// What brought a followed state_dict to its version.
struct FollowUpdate {
  bool whole = false;           // all of it was fetched
  std::vector<size_t> changed;  // indices of the tensors that came
  uint64_t received_bytes = 0;  // of tensors
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_TYPES_H_
