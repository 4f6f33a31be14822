#include "client/worker.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "client/backoff.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

// What a server that has just started says until a coordinator has loaded its modules.
bool IsComingBack(const absl::Status& status) {
  const std::optional<Reason> reason = GetReason(status);
  return reason == Reason::kModuleNotFound || reason == Reason::kModuleEmpty ||
         reason == Reason::kNoOptimizer;
}

std::optional<uint64_t> LastSequence(const absl::Status& status) {
  const ErrorMetadata metadata = GetErrorMetadata(status);
  const auto it = metadata.find("last_sequence");
  uint64_t last = 0;
  if (it == metadata.end() || !absl::SimpleAtoi(it->second, &last)) return std::nullopt;
  return last;
}

}  // namespace

Worker::Worker(Client client, std::string module, std::string name, WorkerOptions options)
    : client_(std::move(client)),
      module_(std::move(module)),
      name_(std::move(name)),
      options_(options),
      sequence_(static_cast<uint64_t>(absl::ToUnixMicros(absl::Now()))) {}

absl::StatusOr<StateDict> Worker::Fetch(const FetchOptions& options, Cancellation* cancellation) {
  Backoff backoff(options_.initial_backoff, options_.max_backoff, options_.patience);
  while (true) {
    absl::StatusOr<StateDict> state = client_.Fetch(module_, options, cancellation);
    if (state.ok()) {
      base_ = state->version();
      return state;
    }
    const bool again = IsTransient(state.status()) || (base_ && IsComingBack(state.status()));
    if (!again || !backoff.Wait(state.status(), cancellation)) return state;
  }
}

absl::StatusOr<StepResult> Worker::Push(absl::Span<const TensorRef> tensors,
                                        const PushOptions& options) {
  return Send(tensors, options, /*accumulate=*/false);
}

absl::StatusOr<StepResult> Worker::Accumulate(absl::Span<const TensorRef> tensors,
                                              const PushOptions& options) {
  return Send(tensors, options, /*accumulate=*/true);
}

absl::StatusOr<StepResult> Worker::Send(absl::Span<const TensorRef> tensors,
                                        const PushOptions& options, bool accumulate) {
  StepOptions step;
  step.worker = name_;
  step.base = base_;
  step.weight = options.weight;
  step.grad_scale = options.grad_scale;
  step.overrides = options.overrides;
  step.wait = options.wait && !accumulate;
  step.ignore_frozen = options.ignore_frozen;
  step.accumulate = accumulate;
  step.accumulated = accumulated_;
  step.digests = options.digests;
  step.sequence = ++sequence_;
  absl::StatusOr<StepResult> result = SendUntilAnswered(tensors, step, options.cancellation);
  if (GetReason(result.status()) == Reason::kSequenceReused) {
    // An earlier life of this name was ahead of this machine's clock: once more, above it.
    const std::optional<uint64_t> last = LastSequence(result.status());
    if (last && *last >= sequence_ && *last < std::numeric_limits<uint64_t>::max()) {
      step.sequence = sequence_ = *last + 1;
      result = SendUntilAnswered(tensors, step, options.cancellation);
    }
  }
  if (result.ok()) {
    accumulated_ = accumulate ? result->accumulated : 0;
  } else if (absl::IsAborted(result.status())) {
    const std::optional<Reason> reason = GetReason(result.status());
    if (reason == Reason::kAccumulationLost || reason == Reason::kIncarnationChanged) {
      accumulated_ = 0;
    }
  }
  return result;
}

absl::StatusOr<StepResult> Worker::SendUntilAnswered(absl::Span<const TensorRef> tensors,
                                                     StepOptions step,
                                                     Cancellation* cancellation) const {
  Backoff backoff(options_.initial_backoff, options_.max_backoff, options_.patience);
  while (true) {
    absl::StatusOr<StepResult> result = client_.ApplyStep(module_, tensors, step, cancellation);
    // Another call of this step, which was taken for lost, waited too; the newest is answered.
    while (result.ok() && result->outcome == StepOutcome::kPending && step.wait) {
      result = client_.ReplayStep(module_, name_, step.sequence, /*wait=*/true, cancellation);
    }
    if (result.ok()) return result;
    const bool again = IsTransient(result.status()) || (step.base && IsComingBack(result.status()));
    if (!again || !backoff.Wait(result.status(), cancellation)) return result;
    step.resend = true;
  }
}

}  // namespace modelstate::client
