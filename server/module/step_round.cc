#include "server/module/step_round.h"

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

void StepRound::Wait(const std::string& worker, Waiter waiter, const StepAnswer& pending) {
  Waiter before = std::exchange(members_.at(worker).waiter, std::move(waiter));
  if (before) before(pending);
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
