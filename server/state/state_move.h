#ifndef MODELSTATE_SERVER_STATE_STATE_MOVE_H_
#define MODELSTATE_SERVER_STATE_STATE_MOVE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/device/compute_pool.h"
#include "server/device/device.h"
#include "server/state/module_version.h"
#include "server/state/optimizer.h"
#include "server/state/optimizer_state.h"

namespace modelstate {

// One tensor whose elements go to another storage, as another dtype, or both.
struct Conversion {
  StorageRef source;
  RefPtr<TensorStorage> target;  // of count * DTypeSize(to) bytes
  DType from = DType::kF32;
  DType to = DType::kF32;
  uint64_t count = 0;
};

// Fills the targets: CastElements where the dtypes differ, a copy with the digest where they do
// not. Storages of two devices that the host sees are read and written in place, all others in
// pieces by way of host memory. With `compute` the work is shared by its threads. On an error the
// targets' contents are undefined.
absl::Status ConvertElements(absl::Span<const Conversion> conversions,
                             ComputePool* compute = nullptr);

// The same for one tensor, in a fresh storage on `target`. RESOURCE_EXHAUSTED DEVICE_MEMORY.
absl::StatusOr<RefPtr<TensorStorage>> ConvertStorage(const StorageRef& source, DType from, DType to,
                                                     uint64_t count, Device& target,
                                                     ComputePool* compute = nullptr);

// A module's state on another device, or in another floating-point dtype. Nothing of it is shared
// with the old one but storages that need neither.
struct MovedState {
  std::shared_ptr<const ModuleSchema> schema;  // the old one where no dtype changes
  std::vector<StorageRef> storages;            // by schema index
  std::vector<bool> cast;                      // by schema index: its elements changed
  bool parameters_cast = false;
  OptimizerState optimizer_state;
};

// torch's Module.to(device, dtype): floating-point parameters and buffers become `dtype` (unset:
// keep theirs), rounded to nearest even; integer, bool and complex ones keep theirs. Names, order,
// ties, requires_grad and persistent stay.
//
// Optimizer state follows its parameter: moments are matched by name and cast where an F64
// parameter comes or goes, step counts stay, and a master copy stays unless its parameter was cast:
// then the next step makes it anew from the cast elements. `optimizer` is null when there is none.
//
// All of it is allocated before anything is filled; on an error (RESOURCE_EXHAUSTED DEVICE_MEMORY,
// or a device that fails) the inputs are as before. nullopt: nothing would change.
absl::StatusOr<std::optional<MovedState>> MoveState(const ModuleVersion& current,
                                                    const Optimizer* optimizer,
                                                    const OptimizerState& optimizer_state,
                                                    Device& device, std::optional<DType> dtype,
                                                    ComputePool* compute);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_STATE_MOVE_H_
