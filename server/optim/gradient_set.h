#ifndef MODELSTATE_SERVER_OPTIM_GRADIENT_SET_H_
#define MODELSTATE_SERVER_OPTIM_GRADIENT_SET_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/memory_budget.h"
#include "server/state/module_schema.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// One tensor of a push as its table announces it.
struct PushedTensor {
  std::string name;
  TensorKind kind = TensorKind::kGradient;  // or kBuffer: a value to assign
  DType dtype = DType::kF32;
  Shape shape;
};

// What a gradient contributes to the norm: the squares of its elements, summed in double over fixed
// blocks and then in a fixed tree.
struct TensorNorm {
  double sum_of_squares = 0;
  bool finite = true;
};

// A push, matched with a schema: where each tensor goes. The storages are filled by the receiver
// and consumed by the step, which writes the new parameter over the gradient where their widths are
// the same.
struct GradientSet {
  struct Entry {
    uint32_t index = 0;             // of the owner in the schema
    size_t tensor = 0;              // in `tensors`, whose dtype and shape its elements have
    RefPtr<TensorStorage> storage;  // sole reference
    RefPtr<TensorStorage> output;   // for the new parameter, where `storage` cannot take it
    // Of `storage`, multiplied by 1 / norm_scale: where the receiver has computed it (NormStream).
    std::optional<TensorNorm> norm;
  };
  std::shared_ptr<const ModuleSchema> schema;  // that the entries were matched with
  Device* device = nullptr;                    // where all storages are
  std::vector<PushedTensor> tensors;           // the table, in its order
  std::vector<Entry> entries;                  // in the order of `tensors`, less the ignored ones
  double norm_scale = 1;                       // of the entries' norms
  // With ignore_frozen: gradients of frozen parameters have no entry, they are counted.
  bool ignore_frozen = false;
  uint64_t ignored = 0;
  MemoryBudget::Reservation reservation;  // of what was staged
  // Of outputs that a step added, maybe of another budget: what a worker has accumulated is in that
  // of pushes, the round that it joins has its own.
  std::vector<MemoryBudget::Reservation> of_outputs;

  uint64_t staged_bytes() const;    // of all storages, which are looked at
  uint64_t reserved_bytes() const;  // for them; more where some were dropped
};

// Checks a whole push against `schema` and allocates its storages on `device`: every name known and
// given once (also through an alias), gradients of parameters that require grad, buffer values of
// buffers, the module's shape, its dtype or for a gradient F32, BF16 or F16. INVALID_ARGUMENT
// UNKNOWN_KEY, NOT_A_PARAMETER, INVALID_FIELD (a parameter as a buffer, a kind that no push has),
// SHAPE_MISMATCH, DTYPE_MISMATCH, CHUNK_INVALID (twice); FAILED_PRECONDITION PARAMETER_FROZEN,
// MODULE_EMPTY; RESOURCE_EXHAUSTED PUSH_MEMORY (before anything is allocated), DEVICE_MEMORY.
//
// With `ignore_frozen` the gradient of a frozen parameter is no error: it is checked like the
// others, and ignored. `outputs`: where a gradient has another width than its parameter, allocates
// the place of the new parameter too, so that the step will not fail for want of it.
absl::StatusOr<GradientSet> StageGradients(std::shared_ptr<const ModuleSchema> schema,
                                           std::vector<PushedTensor> tensors, Device& device,
                                           MemoryBudget& push_budget, bool ignore_frozen = false,
                                           bool outputs = true);

// The same checks again against a newer schema (a freeze or a load came in between); fills in the
// new indices. With ignore_frozen, gradients of what is frozen now are dropped; what was ignored
// before stays ignored, as its elements are gone. On an error nothing has changed.
absl::Status RematchGradients(std::shared_ptr<const ModuleSchema> schema, GradientSet& gradients);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_GRADIENT_SET_H_
