#ifndef MODELSTATE_SERVER_STATE_LOAD_PLAN_H_
#define MODELSTATE_SERVER_STATE_LOAD_PLAN_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/memory_budget.h"
#include "server/state/module_schema.h"
#include "server/state/module_version.h"

namespace modelstate {

// A tensor that a load brings, without its elements.
struct IncomingTensor {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  std::optional<TensorKind> kind;   // where the source says; `kind_rule` tells how
  const char* kind_rule = nullptr;  // "checkpoint kind", "pickled Parameter"
  std::optional<bool> requires_grad;
  std::string alias_of;
  bool persistent = true;  // into an empty module
};

struct LoadOptions {
  bool strict = true;
  bool assign = false;
  std::string strip_prefix;
  std::string add_prefix;
  std::vector<std::string> buffer_globs;
  // Nothing will be loaded: what would be an error of the keys or sizes is a list of the plan.
  bool dry_run = false;
  uint64_t skip_keys = 0;  // for who shows the lists; a plan has all of them

  // What the source says of its modules' versions, by their names in the source (see
  // CheckpointReader::module_versions). torch's batch norm got its num_batches_tracked with version
  // 2, so where that is missing in the source it is no missing key and keeps its count, unless the
  // source gives its module version 2 or more, or is a whole module of ours.
  std::map<std::string, int64_t> module_versions;
  bool source_is_whole = false;
};

// What `load_state_dict` of these tensors into a module means, decided before any byte is read.
// The rules are those of torch (docs: torch.nn.Module.load_state_dict); into an empty module the
// tensors make the schema, and the kind of each is decided in this order: the source's own word,
// the request's buffer globs, a pickled Parameter, a dtype that cannot require grad, a last name
// part running_mean, running_var or num_batches_tracked, else a parameter. (The globs win over a
// pickled Parameter; our own checkpoints' kinds win over the globs.)
struct LoadPlan {
  struct Item {
    uint32_t source = 0;  // index of the incoming tensor
    uint32_t target = 0;  // index in `schema`, an owner
    DType source_dtype = DType::kF32;
    DType target_dtype = DType::kF32;  // elements are cast when they differ
    uint64_t target_bytes = 0;
  };
  struct Decision {
    std::string rule;
    uint64_t parameters = 0;
    uint64_t buffers = 0;
  };

  std::shared_ptr<const ModuleSchema> base;  // what it was planned against
  std::shared_ptr<const ModuleSchema>
      schema;               // after the load; `base` itself where nothing changes
  std::vector<Item> items;  // each target once
  std::vector<Decision> decisions;
  // In torch's order. Not empty only when not strict, or for a dry run.
  std::vector<std::string> missing_keys;
  std::vector<std::string> unexpected_keys;
  // Only for a dry run: "size mismatch for ..." in torch's words.
  std::vector<std::string> size_mismatches;
  uint64_t total_bytes = 0;  // of the targets

  // INVALID_ARGUMENT MISSING_KEY, UNKNOWN_KEY (strict), SHAPE_MISMATCH and DTYPE_MISMATCH (always
  // errors; the latter when a parameter that requires grad would be assigned integers), all texts
  // together, in torch's words, with the first reason that applies; CHUNK_INVALID (a key twice).
  // INVALID_ARGUMENT UNKNOWN_KEY for an alias of nothing; into an empty module also the errors of
  // ModuleSchema::Create. `module` is for messages.
  static absl::StatusOr<LoadPlan> Create(absl::string_view module,
                                         std::shared_ptr<const ModuleSchema> base,
                                         absl::Span<const IncomingTensor> incoming,
                                         const LoadOptions& options);
};

// A load whose elements are all here.
struct StagedLoad {
  LoadPlan plan;
  std::vector<StorageRef> storages;  // parallel to plan.items, of the target's dtype
  MemoryBudget::Reservation reservation;
  std::string detail;  // where it comes from, for the module's history: "crepe.pth (torch zip)"
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_LOAD_PLAN_H_
