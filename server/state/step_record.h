#ifndef MODELSTATE_SERVER_STATE_STEP_RECORD_H_
#define MODELSTATE_SERVER_STATE_STEP_RECORD_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/base/tensor_spec.h"

namespace modelstate {

// The numbers are those of `modelstate.v1.StepOutcome` on the wire.
enum class StepOutcome : uint8_t {
  kApplied = 1,
  kPending = 2,
  kSkippedNonfinite = 3,
  kAccumulated = 4
};

// What a push is told.
struct StepAnswer {
  StepOutcome outcome = StepOutcome::kApplied;
  bool replayed = false;
  Version version;
  uint64_t step = 0;
  uint32_t contributions = 1;
  uint32_t quorum = 1;
  double grad_norm = 0;
  double clip_coef = 1;
  std::vector<std::string> nonfinite;
  // Of a round: whose gradients those were, where that is known. Not in checkpoints.
  std::vector<std::string> nonfinite_workers;
  uint64_t updated = 0;
  uint64_t skipped = 0;
  uint64_t ignored = 0;      // gradients of frozen parameters
  uint32_t accumulated = 0;  // pushes that wait for the worker's next step
};

// The last step of one worker: what makes a repeat harmless.
struct WorkerRecord {
  uint64_t sequence = 0;
  std::string payload_digest;  // XXH3-128 in hex, of everything that the push said
  StepAnswer answer;
};

// By worker name. Part of a checkpoint.
using WorkerRecords = std::map<std::string, WorkerRecord>;

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_STEP_RECORD_H_
