#ifndef MODELSTATE_CLIENT_MODULE_TYPES_H_
#define MODELSTATE_CLIENT_MODULE_TYPES_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "common/base/selection.h"
#include "common/base/tensor_spec.h"

// The server and its modules, as plain values. The meaning of each field is that of the field of
// the same name in proto/modelstate/v1, where it is documented. All sizes are bytes.
namespace modelstate::client {

struct DeviceInfo {
  std::string name;
  uint64_t memory_limit = 0;
  uint64_t memory_used = 0;
  uint64_t memory_pooled = 0;
};

// Saves that the server made by itself since its start.
struct PeriodicSaves {
  uint64_t saved = 0;
  uint64_t failed = 0;
  std::string last_error;
};

struct ServerInfo {
  std::string version;
  uint64_t incarnation = 0;
  std::vector<DeviceInfo> devices;
  uint64_t max_message_bytes = 0;
  uint64_t max_chunk_bytes = 0;
  uint64_t push_memory_limit = 0;
  uint64_t push_memory_used = 0;
  uint64_t snapshot_memory_limit = 0;
  uint64_t snapshot_memory_used = 0;
  uint64_t held_versions = 0;
  uint64_t pins = 0;
  uint64_t running_calls = 0;
  absl::Duration max_lease;
  absl::Duration stream_stall_timeout;
  std::vector<std::string> checkpoint_formats;
  std::vector<std::string> optimizers;
  absl::Time start_time;
  uint64_t module_count = 0;
  std::optional<PeriodicSaves> periodic_saves;  // none: the server saves nothing by itself
};

// How a tensor is filled: torch.nn.init. What is unset has torch's default.
struct Initializer {
  enum class Kind {
    kZeros,
    kOnes,
    kConstant,
    kUniform,
    kNormal,
    kKaimingUniform,
    kKaimingNormal,
    kXavierUniform,
    kXavierNormal,
  };
  Kind kind = Kind::kZeros;
  double constant = 0;           // kConstant
  std::optional<double> low;     // kUniform; 0
  std::optional<double> high;    // kUniform; 1
  std::optional<double> mean;    // kNormal; 0
  std::optional<double> std;     // kNormal; 1
  std::optional<double> a;       // kKaiming...; 0
  std::string mode;              // kKaiming...; "fan_in"
  std::string nonlinearity;      // kKaiming...; "leaky_relu"
  std::optional<double> gain;    // kXavier...; 1
  std::optional<uint64_t> seed;  // unset: that of the whole spec
};

// Elements as a person gives them: one of doubles (C64: two per element), integers, and the bytes
// as they lie in memory.
using Values = std::variant<std::vector<double>, std::vector<int64_t>, std::string>;

// A parameter or buffer to register. Neither values nor an initializer: zeros. A tied one (with
// spec.alias_of) has its owner's dtype, shape and elements: only the name counts.
struct Registration {
  TensorSpec spec;
  std::optional<Values> values;
  std::optional<Initializer> initializer;
};

struct ModuleSpec {
  std::vector<Registration> tensors;  // in state_dict order
  std::map<std::string, std::string> metadata;
  uint64_t seed = 0;
};

enum class ModuleState { kUnknown = 0, kEmpty = 1, kReady = 2, kFailed = 3 };

struct ModuleInfo {
  std::string name;
  ModuleState state = ModuleState::kUnknown;
  Version version;
  uint64_t step = 0;
  uint64_t schema_revision = 0;
  std::string layout_digest;
  uint64_t parameter_count = 0;
  uint64_t buffer_count = 0;
  uint64_t parameter_elements = 0;
  uint64_t total_bytes = 0;
  std::string device;
  bool has_optimizer = false;
  std::map<std::string, std::string> metadata;
  absl::Time create_time;
};

// Over all elements; min, max, mean and 2-norm over the finite ones.
struct TensorStatistics {
  uint64_t count = 0;
  double min = 0;
  double max = 0;
  double mean = 0;
  double norm = 0;
  uint64_t nonfinite = 0;
};

struct TensorInfo {
  TensorSpec spec;
  uint64_t changed_version = 0;
  std::optional<uint64_t> xxh3;
  std::optional<TensorStatistics> statistics;
  std::string slot;               // spec.slot
  std::optional<uint32_t> group;  // of a parameter: in OptimizerInfo::groups; unset: none
};

// Which of a module's names a listing shows.
enum class ListView {
  kRegistered = 0,  // all of them
  kNamed = 1,       // as named_parameters() and named_buffers(): of tied names the first
  kStateDict = 2,   // as state_dict(): all tied names, no non-persistent buffer
};

struct ListOptions {
  Selection selection = {};
  ListView view = ListView::kRegistered;
  bool digests = false;
  bool statistics = false;
  uint64_t max_tensors = 0;  // stop after so many; 0: all
};

struct TensorList {
  std::vector<TensorInfo> tensors;  // in state_dict order
  uint64_t total = 0;               // that there are, also beyond max_tensors
  Version version;
  uint64_t step = 0;
};

struct GetTensorOptions {
  uint64_t first = 0;
  uint32_t count = 0;  // 0: at most 64
  std::string snapshot_id = {};
  std::string slice = {};  // "0", "-1, ::2"; empty: the whole tensor
};

struct TensorElements {
  TensorInfo tensor;
  uint64_t first = 0;
  // One of them is filled: integers and BOOL as ints, the rest as doubles (C64: two per element).
  std::vector<int64_t> ints;
  std::vector<double> doubles;
  std::vector<int64_t> slice_shape;  // of what the slice selects; without one the tensor's
  TensorStatistics statistics;
  Version version;
  uint64_t step = 0;
};

struct MoveOptions {
  std::string device = {};          // empty: stay
  std::optional<DType> dtype = {};  // of the floating-point tensors
};

// What one published mutation did.
struct VersionInfo {
  Version version;
  // "CREATE", "LOAD", "STEP", "FREEZE", "MOVE", "CONFIGURE_OPTIMIZER", "BUFFER_WRITE".
  std::string mutation;
  absl::Time time;
  uint64_t step = 0;
  uint64_t schema_revision = 0;
  uint64_t changed_parameters = 0;
  uint64_t changed_buffers = 0;
  uint64_t changed_bytes = 0;
  std::vector<std::string> tensors;  // the first 10
  std::string detail;
  bool held = false;  // it can be read
};

struct SnapshotInfo {
  std::string snapshot_id;
  std::string module;
  Version version;
  uint64_t step = 0;
  std::string layout_digest;
  uint64_t total_bytes = 0;
  absl::Time expire_time;
  bool optimizer_state = false;  // it holds that too
};

struct WatchEvent {
  ModuleInfo module;
  std::string last_mutation;  // as in VersionInfo, or "DELETE"
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_MODULE_TYPES_H_
