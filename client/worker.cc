#include "client/worker.h"

#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/backoff.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

// What a server says until a coordinator has made, loaded and configured the module: at the start
// of a training, and after a restart.
bool IsNotThereYet(const absl::Status& status) {
  const std::optional<Reason> reason = GetReason(status);
  return reason == Reason::kModuleNotFound || reason == Reason::kModuleEmpty ||
         reason == Reason::kNoOptimizer;
}

// A call that was cut, by the transport or by a server that ends. Not said by the server's code.
bool WasCut(const absl::Status& status) {
  return !GetReason(status) && (absl::IsCancelled(status) || absl::IsUnknown(status));
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
  StateDict state;
  MS_RETURN_IF_ERROR(FetchInto(&state, options, cancellation));
  return state;
}

absl::Status Worker::FetchInto(StateDict* state, const FetchOptions& options,
                               Cancellation* cancellation) {
  Backoff backoff(options_.initial_backoff, options_.max_backoff, options_.patience);
  while (true) {
    absl::Status status = client_.FetchInto(module_, state, options, cancellation);
    if (status.ok()) {
      base_ = state->version();
      step_ = state->step();
      return status;
    }
    const bool again = IsTransient(status) || WasCut(status) || IsNotThereYet(status);
    if (!again || !backoff.Wait(status, cancellation)) return status;
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
  step.resend = options.again;
  if (!options.again) ++sequence_;
  step.sequence = sequence_;
  absl::StatusOr<StepResult> result = SendUntilAnswered(tensors, step, options.cancellation);
  if (GetReason(result.status()) == Reason::kSequenceReused && !placed_ && !options.again) {
    // An earlier life of this name was ahead of this machine's clock: once more, above it. Only
    // before the first answer: after that it is another process, whose steps are not to be mixed.
    const std::optional<uint64_t> last = LastSequence(result.status());
    if (last && *last >= sequence_ && *last < std::numeric_limits<uint64_t>::max()) {
      step.sequence = sequence_ = *last + 1;
      result = SendUntilAnswered(tensors, step, options.cancellation);
    }
  }
  if (result.ok()) {
    placed_ = true;
    step_ = result->step;
    accumulated_ = accumulate ? result->accumulated : 0;
    return result;
  }
  const std::optional<Reason> reason = GetReason(result.status());
  // Gradients of one step are computed from one version: after STALE_BASE from another.
  if (reason == Reason::kAccumulationLost || reason == Reason::kStaleBase) accumulated_ = 0;
  if (reason == Reason::kIncarnationChanged) {
    accumulated_ = 0;
    placed_ = false;
    return WhereItWentBackTo(result.status());
  }
  return result;
}

absl::StatusOr<StepResult> Worker::SendUntilAnswered(absl::Span<const TensorRef> tensors,
                                                     StepOptions step,
                                                     Cancellation* cancellation) const {
  Backoff backoff(options_.initial_backoff, options_.max_backoff, options_.patience);
  while (true) {
    absl::StatusOr<StepResult> result = client_.ApplyStep(module_, tensors, step, cancellation);
    // PENDING in spite of `wait`: an earlier call of this step, which was taken for lost, came
    // after this one.
    if (result.ok() && !(result->outcome == StepOutcome::kPending && step.wait)) return result;
    const absl::Status& status = result.status();
    // After ROUND_GIVEN_UP the same push counts as if it had not been sent.
    const bool in_round = result.ok() || GetReason(status) == Reason::kAlreadyContributed ||
                          GetReason(status) == Reason::kRoundGivenUp;
    if (in_round) backoff.Reset();
    const bool again = in_round || IsTransient(status) || WasCut(status) || IsNotThereYet(status);
    if (!again || !backoff.Wait(status, cancellation)) return result;
    step.resend = true;
  }
}

absl::Status Worker::WhereItWentBackTo(const absl::Status& status) const {
  const absl::StatusOr<ModuleInfo> module = client_.GetModule(module_);
  if (!module.ok()) return status;
  ErrorMetadata metadata = GetErrorMetadata(status);
  metadata["step"] = absl::StrCat(module->step);
  metadata["version"] = absl::StrCat(module->version.number);
  return MakeError(Reason::kIncarnationChanged,
                   absl::StrCat("module \"", module_, "\" is at step ", module->step, ", version ",
                                module->version.number, ", and worker \"", name_,
                                "\" had been told of step ", step_,
                                ": it was made anew, or the server restarted from a checkpoint; "
                                "Fetch, and go on from what that gives"),
                   std::move(metadata));
}

}  // namespace modelstate::client
