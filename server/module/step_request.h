#ifndef MODELSTATE_SERVER_MODULE_STEP_REQUEST_H_
#define MODELSTATE_SERVER_MODULE_STEP_REQUEST_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/base/optimizer_config.h"
#include "common/base/tensor_spec.h"
#include "server/device/host_transfer.h"
#include "server/optim/gradient_set.h"

namespace modelstate {

// A push, as ModuleInstance::ApplyStep takes it. The fields are those of
// `modelstate.v1.StepHeader`.
//
// The whole decision is made on the strand, in this order: the worker's record (a repeat gets its
// answer with `replayed`; a lower sequence or the same with another payload is SEQUENCE_REUSED),
// NO_OPTIMIZER, whether the worker may push now (ALREADY_CONTRIBUTED, ACCUMULATION_LOST,
// WORKER_LIMIT), the base (INCARNATION_CHANGED, STALE_BASE by the optimizer's max_staleness), a
// rematch when the schema has changed (NOT_IN_A_GROUP; what is frozen by now is dropped where
// ignore_frozen is set), then the step, or the round that it joins, or the sum that it is added
// to. Only what was taken is recorded. INVALID_FIELD for a worker without a sequence or the
// reverse, rounds or an accumulation without either, a weight or grad_scale that is not positive
// and finite (of a round: in sum), overrides or `wait` on a push that accumulates, a base that was
// never published. NOT_FOUND STEP_NOT_SEEN for a header alone whose step is not the worker's last;
// ABORTED ROUND_GIVEN_UP with a retry hint for a whole repeat whose first was given up meanwhile.
// With `wait`, the answer of a contribution is given when its round closes (or the server drains,
// UNAVAILABLE DRAINING, or EndWait). A step that a round fails to make for want of memory is
// refused to the worker that would have closed it, and the round stays open. A change that the
// round does not fit gives it up: ABORTED ROUND_GIVEN_UP, after a load of parameters STALE_BASE;
// all may push the same sequence again. A base older than the last 4096 runs of consecutive
// parameter changes is stale whatever max_staleness is, unless that is unset.
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
  // That brings the gradients to their device; null: they are there.
  std::unique_ptr<HostWriter> arrival;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_STEP_REQUEST_H_
