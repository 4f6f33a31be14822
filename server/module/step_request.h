#ifndef MODELSTATE_SERVER_MODULE_STEP_REQUEST_H_
#define MODELSTATE_SERVER_MODULE_STEP_REQUEST_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/base/optimizer_config.h"
#include "common/base/tensor_spec.h"
#include "server/optim/gradient_set.h"

namespace modelstate {

// A push, as ModuleInstance::ApplyStep takes it. The fields are those of
// `modelstate.v1.StepHeader`.
struct StepRequest {
  std::string worker;     // empty: not deduplicated
  uint64_t sequence = 0;  // > 0 with a worker
  std::optional<Version> base;
  double weight = 1;
  std::optional<double> grad_scale;
  std::vector<GroupOverride> overrides;
  bool wait = false;                    // for the round to close
  const void* call = nullptr;           // that waits: for ModuleInstance::EndWait
  bool accumulate = false;              // for the worker's next step
  std::optional<uint32_t> accumulated;  // what the worker believes was accumulated before
  std::string payload_digest;
  // nullopt: ask for the answer of an earlier push only (of this payload, where its digest is set).
  std::optional<GradientSet> gradients;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_STEP_REQUEST_H_
