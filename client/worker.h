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
  // How long a fetch or push goes on while the server cannot be reached, is full, or has no such
  // module yet, or one without elements or optimizer: at the start of a training, before a
  // coordinator has made it, and after a restart. Waiting for a round to close does not count.
  absl::Duration patience = absl::Minutes(5);
  absl::Duration initial_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
};

struct PushOptions {
  double weight = 1;  // in a round's mean
  std::optional<double> grad_scale;
  std::vector<GroupOverride> overrides;
  bool wait = true;  // where the optimizer has rounds: for the round to close
  bool ignore_frozen = false;
  bool digests = true;
  // The last push once more, with the same tensors and options, because its answer did not come: it
  // counts once, whether it had arrived or not.
  bool again = false;
  // Outlives the call. One with a deadline bounds how long a round is waited for.
  Cancellation* cancellation = nullptr;
};

// One worker of a training: it numbers its pushes, so that each is applied once whatever happens on
// the way, and says from which version their gradients were computed.
//
//   Worker worker(client, "resnet50", "worker-3");
//   StateDict weights;
//   while (training) {
//     absl::Status fetched = worker.FetchInto(&weights);
//     ... gradients from weights
//     absl::StatusOr<StepResult> step = worker.Push(gradients);
//   }
//
// What a push returns beside the errors of ApplyStep that say what is wrong with it:
//   ABORTED INCARNATION_CHANGED  The module was made anew, or the server restarted and loaded a
//                                checkpoint: steps after that save are gone. The text says which
//                                step it is at. Fetch, and go on from what it gives.
//   ABORTED STALE_BASE           Others were faster than max_staleness allows. Fetch, compute
//                                again.
//   ABORTED ACCUMULATION_LOST    What was accumulated is gone: Accumulate all micro-batches of this
//                                step again. They are the caller's: nothing is kept here.
//   ABORTED SEQUENCE_REUSED      Another process pushes under this name: this one must end.
// None of these has changed anything; the worker can go on after the first three. But after
//   UNAVAILABLE                  patience is over,
//   DEADLINE_EXCEEDED, CANCELLED the cancellation's deadline came, or it was cancelled,
// the push may have arrived or not: make it again with `again`. A contribution to a round stays in
// it. NOT_FOUND MODULE_NOT_FOUND, FAILED_PRECONDITION MODULE_EMPTY and NO_OPTIMIZER come when
// patience with a module that is not there yet is over.
//
// A worker without a base (never fetched, none set) is not told of a restart: what it pushes is
// added to whatever state is there.
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
  // The same in the memory of `*state`, as Client::FetchInto.
  absl::Status FetchInto(StateDict* state, const FetchOptions& options = {},
                         Cancellation* cancellation = nullptr);
  // For gradients that were computed from a version that was had in another way.
  void set_base(std::optional<Version> base) { base_ = base; }
  std::optional<Version> base() const { return base_; }

  // Gradients (spec.kind kGradient) and buffer values (kBuffer): one step, or one contribution to a
  // round. A worker that is still in the open round waits for that to close first.
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
  absl::Status WhereItWentBackTo(const absl::Status& status) const;

  const Client client_;
  const std::string module_;
  const std::string name_;
  const WorkerOptions options_;
  uint64_t sequence_;
  bool placed_ = false;  // above the sequences of the name's earlier lives
  uint32_t accumulated_ = 0;
  std::optional<Version> base_;
  uint64_t step_ = 0;  // the newest of the module's that this worker was told of
};

}  // namespace modelstate::client

namespace modelstate {
using client::Worker;
using client::WorkerOptions;
}  // namespace modelstate

#endif  // MODELSTATE_CLIENT_WORKER_H_
