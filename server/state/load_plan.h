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
};

struct LoadOptions {
  bool strict = true;
  bool assign = false;
  std::string strip_prefix;
  std::string add_prefix;
  std::vector<std::string> buffer_globs;
  // The source says nothing of batch norm's version, or one below 2: a num_batches_tracked that is
  // not in it keeps its count and is no missing key.
  bool old_batch_norm = false;
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
  std::vector<std::string> missing_keys;     // only when not strict
  std::vector<std::string> unexpected_keys;  // only when not strict
  uint64_t total_bytes = 0;                  // of the targets

  // INVALID_ARGUMENT MISSING_KEY, UNKNOWN_KEY (strict; both texts together, in torch's words, with
  // the first reason that applies), SHAPE_MISMATCH (always an error), CHUNK_INVALID (a key twice).
  // `module` is for messages.
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
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_LOAD_PLAN_H_
