#ifndef MODELSTATE_SERVER_RPC_INITIAL_VALUES_H_
#define MODELSTATE_SERVER_RPC_INITIAL_VALUES_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/tensor_spec.h"
#include "modelstate/v1/types.pb.h"
#include "server/device/compute_pool.h"
#include "server/state/initializer.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// What a tensor begins with, checked.
struct InitialValue {
  // All elements, or one that is repeated, or none for zeros.
  std::string elements;
  // Random ones, in place of `elements`.
  std::optional<Draw> draw;
  uint64_t seed = 0;
};

// What `info` says by its values or its initializer; zeros where it has neither. `seed` is for an
// initializer without one. INVALID_FIELD (both, a wrong initializer), SHAPE_MISMATCH (number of
// values), NOT_REPRESENTABLE; the tensor is named. Allocates what the values need.
absl::StatusOr<InitialValue> InitialValueFromProto(const v1::TensorInfo& info,
                                                   const TensorSpec& spec, uint64_t seed);

// INVALID_FIELD for a tied name that brings values or an initializer of its own (`has_value`).
absl::Status CheckTiedHasNoValue(const TensorSpec& spec, bool has_value);

// Writes it to the whole storage, which is not yet published.
absl::Status FillInitialValue(const InitialValue& value, const TensorSpec& spec,
                              ComputePool& compute, TensorStorage& storage);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_INITIAL_VALUES_H_
