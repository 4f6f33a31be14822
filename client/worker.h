#ifndef MODELSTATE_CLIENT_WORKER_H_
#define MODELSTATE_CLIENT_WORKER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/client.h"

namespace modelstate::client {

struct WorkerOptions {
  // How long a push goes on while the server cannot be reached, is full, or has not loaded the
  // module yet after a restart. Waiting for a round to close does not count.
  absl::Duration patience = absl::Minutes(5);
  absl::Duration initial_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
};

struct PushOptions {
  double weight = 0;  // 0: 1
  std::optional<double> grad_scale;
  std::vector<GroupOverride> overrides;
  bool wait = true;  // where the optimizer has rounds: for the round to close
  bool ignore_frozen = false;
  bool digests = true;
  Cancellation* cancellation = nullptr;  // outlives the call
};

// One worker of a training: it numbers its pushes, so that each is applied once whatever happens on
// the way, and says from which version their gradients were computed.
//
//   Worker worker(client, "resnet50", "worker-3");
//   while (training) {
//     absl::StatusOr<StateDict> weights = worker.Fetch();
//     ... gradients from *weights
//     absl::StatusOr<StepResult> step = worker.Push(gradients);
//   }
//
// What a push returns beside the errors of ApplyStep that say what is wrong with it:
//   ABORTED INCARNATION_CHANGED  the module was made anew, or the server restarted and loaded a
//                                checkpoint: steps after that save are gone. Fetch, and go on from
//                                what it gives.
//   ABORTED STALE_BASE           others were faster than max_staleness allows. Fetch, compute
//   again. ABORTED ACCUMULATION_LOST    what was accumulated is gone: Accumulate all of this step
//   again. ABORTED SEQUENCE_REUSED      another process pushes under this name.
// None of them has changed anything; the worker can go on after each.
//
// Sequences begin at the time in microseconds, so that a process that is started again under the
// same name goes on above its last life's. Not thread-safe: one call at a time. A name belongs to
// one process at a time.
class Worker {
 public:
  Worker(Client client, std::string module, std::string name, WorkerOptions options = {});

  // The newest state_dict; what is pushed after it is based on it.
  absl::StatusOr<StateDict> Fetch(const FetchOptions& options = {},
                                  Cancellation* cancellation = nullptr);
  // For gradients that were computed from a version that was had in another way.
  void set_base(std::optional<Version> base) { base_ = base; }
  std::optional<Version> base() const { return base_; }

  // Gradients (spec.kind kGradient) and buffer values (kBuffer): one step, or one contribution to a
  // round.
  absl::StatusOr<StepResult> Push(absl::Span<const TensorRef> tensors,
                                  const PushOptions& options = {});
  // Gradients that the next Push steps with too.
  absl::StatusOr<StepResult> Accumulate(absl::Span<const TensorRef> tensors,
                                        const PushOptions& options = {});

  const std::string& name() const { return name_; }
  uint64_t sequence() const { return sequence_; }  // of the last push

 private:
  absl::StatusOr<StepResult> Send(absl::Span<const TensorRef> tensors, const PushOptions& options,
                                  bool accumulate);
  absl::StatusOr<StepResult> SendUntilAnswered(absl::Span<const TensorRef> tensors,
                                               StepOptions step, Cancellation* cancellation) const;

  const Client client_;
  const std::string module_;
  const std::string name_;
  const WorkerOptions options_;
  uint64_t sequence_;
  uint32_t accumulated_ = 0;
  std::optional<Version> base_;
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_WORKER_H_
