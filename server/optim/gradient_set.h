#ifndef MODELSTATE_SERVER_OPTIM_GRADIENT_SET_H_
#define MODELSTATE_SERVER_OPTIM_GRADIENT_SET_H_

#include <cstdint>
#include <memory>
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

// A push, matched with a schema: where each tensor goes. The storages are filled by the receiver
// and consumed by the step, which writes the new parameter over the gradient.
struct GradientSet {
  struct Entry {
    uint32_t index = 0;             // of the owner in the schema
    size_t tensor = 0;              // in `tensors`
    RefPtr<TensorStorage> storage;  // sole reference; bytes of the parameter's dtype and shape
  };
  std::shared_ptr<const ModuleSchema> schema;  // that the entries were matched with
  std::vector<PushedTensor> tensors;           // the table, in its order
  std::vector<Entry> entries;                  // in the order of `tensors`, less the ignored ones
  // With ignore_frozen: gradients of frozen parameters have no entry, they are counted.
  bool ignore_frozen = false;
  uint64_t ignored = 0;
  MemoryBudget::Reservation reservation;  // of the bytes that are staged
};

// Checks a whole push against `schema` and allocates its storages on `device`: every name known and
// given once (also through an alias), gradients of parameters that require grad, buffer values of
// buffers, dtype and shape the module's. INVALID_ARGUMENT UNKNOWN_KEY, NOT_A_PARAMETER,
// INVALID_FIELD (a parameter as a buffer, a kind that no push has), SHAPE_MISMATCH, DTYPE_MISMATCH,
// CHUNK_INVALID (twice); FAILED_PRECONDITION PARAMETER_FROZEN, MODULE_EMPTY; RESOURCE_EXHAUSTED
// PUSH_MEMORY (before anything is allocated), DEVICE_MEMORY.
//
// With `ignore_frozen` the gradient of a frozen parameter is no error: it is checked like the
// others, and ignored.
absl::StatusOr<GradientSet> StageGradients(std::shared_ptr<const ModuleSchema> schema,
                                           std::vector<PushedTensor> tensors, Device& device,
                                           MemoryBudget& push_budget, bool ignore_frozen = false);

// The same checks again against a newer schema (a freeze or a load came in between); fills in the
// new indices. With ignore_frozen, gradients of what is frozen now are dropped; what was ignored
// before stays ignored, as its elements are gone. On an error nothing has changed.
absl::Status RematchGradients(std::shared_ptr<const ModuleSchema> schema, GradientSet& gradients);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_GRADIENT_SET_H_
