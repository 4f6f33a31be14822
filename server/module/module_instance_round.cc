// The rounds that pushes join, and what changes of the module mean for what waits.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"

namespace modelstate {
namespace {

constexpr size_t kNamesShown = 10;

// Whether an accumulated gradient can be added to: sums are F32, of F64 parameters F64. Buffer
// values are replaced.
bool IsSumFor(const TensorSpec& spec, DType dtype) {
  if (spec.kind != TensorKind::kParameter) return true;
  return dtype == (spec.dtype == DType::kF64 ? DType::kF64 : DType::kF32);
}

bool HaveSameGroups(const Optimizer& a, const Optimizer& b) {
  if (&a == &b) return true;
  if (a.groups().size() != b.groups().size() || a.schema_size() != b.schema_size()) return false;
  for (uint32_t i = 0; i < a.schema_size(); ++i) {
    if (a.group_of(i) != b.group_of(i)) return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<StepAnswer> ModuleInstance::Contribute(StepRequest& request,
                                                      WorkerTable::Worker& worker,
                                                      Contribution contribution) {
  absl::Status joins = round_.CheckOverrides(request.overrides);
  joins.Update(round_.CheckWeight(request.weight));
  if (!joins.ok()) {
    worker.TakeBack(contribution);
    return joins;
  }
  StepRound::Member member;
  member.record_before = worker.last;
  member.accumulated_before = worker.accumulated_count;
  member.ignored = contribution.parts.back().gradients.ignored;
  member.contribution = std::move(contribution);
  round_.Add(request.worker, std::move(member), request.overrides, Now());
  StepAnswer pending;
  pending.outcome = StepOutcome::kPending;
  pending.version = Current()->version;
  pending.step = Current()->step;
  pending.contributions = round_.size();
  pending.quorum = optimizer()->config().rounds.quorum;
  worker.last = WorkerRecord{request.sequence, std::move(request.payload_digest), pending};
  worker.accumulated_count = 0;
  worker.in_round = true;
  if (absl::Status status = CloseRoundIfComplete(); !status.ok()) {
    // The round, if it is still there, goes on without this one.
    if (worker.in_round) {
      StepRound::Member refused = round_.Remove(request.worker);
      TakeBack(request.worker, refused);
    }
    return status;
  }
  return worker.last->answer;
}

absl::Status ModuleInstance::CloseRoundIfComplete() {
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  if (optimizer == nullptr || !round_.IsComplete(optimizer->config().rounds, Now())) {
    return absl::OkStatus();
  }
  std::vector<Contribution> contributions;
  std::vector<std::string> names;
  for (auto& [name, member] : round_.members()) {
    names.push_back(name);
    contributions.push_back(std::move(member.contribution));
  }
  std::vector<size_t> nonfinite;
  absl::StatusOr<StepAnswer> answer = RunStep(
      round_.overrides(), contributions,
      absl::StrCat(
          "round of ", names.size(), ": ",
          absl::StrJoin(names.begin(), names.begin() + std::min(names.size(), kNamesShown), ", ")),
      &nonfinite);
  if (!answer.ok()) {
    size_t i = 0;
    for (auto& [name, member] : round_.members()) {
      member.contribution = std::move(contributions[i++]);
    }
    if (!absl::IsResourceExhausted(answer.status())) GiveUpRound(answer.status());
    return answer.status();
  }
  for (size_t i = 0; i < std::min(nonfinite.size(), kNamesShown); ++i) {
    answer->nonfinite_workers.push_back(names[nonfinite[i]]);
  }
  StepRound closed = std::exchange(round_, StepRound());
  for (auto& [name, member] : closed.members()) {
    WorkerTable::Worker& worker = *workers_.Find(name);
    answer->ignored = member.ignored;
    worker.in_round = false;
    workers_.Touch(worker, Now());  // while it waited it had nothing to send
    worker.last->answer = *answer;
    worker.durable = worker.last;
    member.Answer(*answer);
  }
  return absl::OkStatus();
}

void ModuleInstance::GiveUpRound(const absl::Status& status) {
  StepRound given_up = std::exchange(round_, StepRound());
  for (auto& [name, member] : given_up.members()) {
    TakeBack(name, member);
    member.Answer(status);
  }
}

void ModuleInstance::TakeBack(const std::string& worker, StepRound::Member& member) {
  WorkerTable::Worker& known = *workers_.Find(worker);
  known.in_round = false;
  workers_.Touch(known, Now());
  known.last = std::move(member.record_before);
  known.accumulated_count = member.accumulated_before;
  known.TakeBack(member.contribution);
}

absl::Status ModuleInstance::Refit(GradientSet& gradients) const {
  const VersionRef current = Current();
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  const ModuleSchema& schema = *current->schema;
  // They were taken when these parameters were trained.
  gradients.ignore_frozen = true;
  MS_RETURN_IF_ERROR(RematchGradients(current->schema, gradients));
  std::vector<GradientSet::Entry>& entries = gradients.entries;
  entries.erase(std::remove_if(entries.begin(), entries.end(),
                               [&](const GradientSet::Entry& entry) {
                                 return schema.spec(entry.index).kind == TensorKind::kParameter &&
                                        optimizer->group_of(entry.index) == Optimizer::kNoGroup;
                               }),
                entries.end());
  if (entries.size() == gradients.tensors.size()) return absl::OkStatus();
  // Nothing is left of what is left out: it may be pushed, and accumulated, again.
  std::vector<PushedTensor> tensors;
  tensors.reserve(entries.size());
  for (GradientSet::Entry& entry : entries) {
    tensors.push_back(std::move(gradients.tensors[entry.tensor]));
    entry.tensor = tensors.size() - 1;
  }
  gradients.tensors = std::move(tensors);
  const uint64_t staged = gradients.staged_bytes();
  if (gradients.reservation.bytes() > staged) {
    gradients.reservation.Shrink(gradients.reservation.bytes() - staged);
  }
  return absl::OkStatus();
}

// What matches also fits into what is set aside: that is for the widest gradients that match.
absl::Status ModuleInstance::RefitRound(const Optimizer* before) {
  if (round_.empty()) return absl::OkStatus();
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  MS_RETURN_IF_ERROR(optimizer->Resolve(round_.overrides()).status());
  if (!round_.overrides().empty() && !HaveSameGroups(*before, *optimizer)) {
    return absl::FailedPreconditionError("its group_overrides were for other groups");
  }
  for (auto& [name, member] : round_.members()) {
    for (ScaledGradients& part : member.contribution.parts) {
      const absl::Status status = Refit(part.gradients);
      if (!status.ok()) return Annotate(status, absl::StrCat("worker \"", name, "\""));
    }
  }
  return absl::OkStatus();
}

void ModuleInstance::SettlePending(absl::string_view change, const Optimizer* before) {
  if (const absl::Status why = RefitRound(before); !why.ok()) {
    GiveUpRound(MakeError(
        Reason::kRoundGivenUp,
        absl::StrCat("module \"", name_, "\" ", change,
                     " while a round was open, which does not fit any more (", why.message(),
                     "); nothing of the round counts: push the same sequence again"),
        {{"module", name_}}));
  }
  workers_.DropAccumulatedUnless([&](GradientSet& sum) {
    if (!Refit(sum).ok()) return false;
    return std::all_of(sum.entries.begin(), sum.entries.end(), [&](const GradientSet::Entry& e) {
      return IsSumFor(sum.schema->spec(e.index), sum.tensors[e.tensor].dtype);
    });
  });
  // Why it cannot close, those that wait are told.
  CloseRoundIfComplete().IgnoreError();
  ShowTraining();
}

void ModuleInstance::DropPending(const absl::Status& status) {
  GiveUpRound(status);
  workers_.DropPending();
  ShowTraining();
}

void ModuleInstance::TickOnStrand() {
  tick_posted_.store(false, std::memory_order_relaxed);
  if (deleted()) return;
  workers_.ExpireIdle(Now());
  // Where memory is short it is tried again at the next tick.
  CloseRoundIfComplete().IgnoreError();
  ShowTraining();
}

void ModuleInstance::EndWaitsOnStrand(const absl::Status& status) {
  waits_end_ = status;
  for (auto& [name, member] : round_.members()) member.Answer(status);
}

void ModuleInstance::TrimMemoryAside() {
  // Less never fails.
  round_budget_->SetAside(*environment_.push_budget, round_budget_->limit()).IgnoreError();
}

void ModuleInstance::ShowTraining() {
  // A push may be on its way with more than is set aside by now: looked at until it has come.
  const bool beyond = round_budget_->used() > round_budget_->limit();
  TrimMemoryAside();
  needs_tick_.store(!round_.empty() || workers_.size() > 0 || beyond, std::memory_order_relaxed);
  RoundInfo round = round_.Info();
  absl::MutexLock lock(&mutex_);
  training_.round = std::move(round);
  training_.workers = workers_.size();
}

}  // namespace modelstate
