#include "server/module/step_round.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr size_t kWorkersShown = 100;

}  // namespace

absl::Status StepRound::CheckOverrides(const std::vector<GroupOverride>& overrides) const {
  if (overrides.empty() || overrides_.empty() || overrides == overrides_) return absl::OkStatus();
  return MakeError(Reason::kOverrideConflict,
                   absl::StrCat("group_overrides are not those that worker \"", overrides_from_,
                                "\" sent for the open round; a round is one step: send the same, "
                                "or leave them out"),
                   {{"field", "group_overrides"}, {"worker", overrides_from_}});
}

absl::Status StepRound::CheckWeight(double weight) const {
  double sum = weight;
  for (const auto& [worker, member] : members_) sum += member.contribution.weight;
  if (std::isfinite(static_cast<float>(sum))) return absl::OkStatus();
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("weight is ", weight, "; with it the weights of the round add up to ", sum,
                   ", which is not finite as a 32-bit float: send a smaller one"),
      {{"field", "weight"}});
}

void StepRound::Add(const std::string& worker, Member member,
                    const std::vector<GroupOverride>& overrides, absl::Time now) {
  if (members_.empty()) open_time_ = now;
  if (overrides_.empty() && !overrides.empty()) {
    overrides_ = overrides;
    overrides_from_ = worker;
  }
  members_.emplace(worker, std::move(member));
}

StepRound::Member StepRound::Remove(const std::string& worker) {
  Member member = std::move(members_.extract(worker).mapped());
  if (overrides_from_ == worker || members_.empty()) {
    overrides_.clear();
    overrides_from_.clear();
  }
  return member;
}

void StepRound::Wait(const std::string& worker, Waiting waiting) {
  members_.at(worker).waiting.push_back(std::move(waiting));
}

void StepRound::EndWait(const std::string& worker, const void* call, const absl::Status& status) {
  const auto member = members_.find(worker);
  if (member == members_.end()) return;
  std::vector<Waiting>& all = member->second.waiting;
  const auto it = std::find_if(all.begin(), all.end(),
                               [call](const Waiting& waiting) { return waiting.call == call; });
  if (it == all.end()) return;
  Waiter answer = std::move(it->answer);
  all.erase(it);
  answer(status);
}

void StepRound::Member::Answer(const absl::StatusOr<StepAnswer>& answer) {
  for (Waiting& one : std::exchange(waiting, {})) {
    absl::StatusOr<StepAnswer> copy = answer;
    if (copy.ok()) copy->replayed = one.replayed;
    one.answer(std::move(copy));
  }
}

bool StepRound::IsComplete(const Rounds& rounds, absl::Time now) const {
  if (members_.empty()) return false;
  if (size() >= rounds.quorum) return true;
  return rounds.min_contributions > 0 && size() >= rounds.min_contributions &&
         now >= open_time_ + rounds.round_timeout;
}

RoundInfo StepRound::Info() const {
  RoundInfo info;
  info.contributions = size();
  info.open_time = open_time_;
  for (const auto& [worker, member] : members_) {
    if (info.workers.size() < kWorkersShown) info.workers.push_back(worker);
    for (const ScaledGradients& part : member.contribution.parts) {
      info.staged_bytes += part.gradients.reservation.bytes();
    }
  }
  return info;
}

}  // namespace modelstate
