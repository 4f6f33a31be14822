#include "tests/fault/exactly_once/history.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"

namespace modelstate {

void History::BeginLife(const Version& version, uint64_t step) {
  absl::MutexLock lock(&mutex_);
  lives_.push_back({version.incarnation, step});
}

void History::Add(const Acknowledgement& acknowledgement) {
  absl::MutexLock lock(&mutex_);
  acknowledgements_.push_back(acknowledgement);
}

std::vector<Acknowledgement> History::Surviving(std::vector<std::string>* problems) const {
  absl::MutexLock lock(&mutex_);
  std::map<uint64_t, Acknowledgement> by_step;
  for (const Life& life : lives_) {
    by_step.erase(by_step.upper_bound(life.first_step), by_step.end());
    for (const Acknowledgement& a : acknowledgements_) {
      if (a.version.incarnation != life.incarnation) continue;
      const auto [it, fresh] = by_step.try_emplace(a.step, a);
      if (fresh || (it->second.worker == a.worker && it->second.index == a.index)) continue;
      problems->push_back(absl::StrCat("step ", a.step, " was push ", a.index, " of worker ",
                                       a.worker, " and push ", it->second.index, " of worker ",
                                       it->second.worker));
    }
  }
  std::vector<Acknowledgement> surviving;
  std::set<std::pair<int, int>> seen;
  uint64_t expected = 1;
  for (const auto& [step, a] : by_step) {
    if (step != expected) {
      problems->push_back(absl::StrCat("nobody was told of steps ", expected, " to ", step - 1));
    }
    expected = step + 1;
    if (!seen.emplace(a.worker, a.index).second) {
      problems->push_back(
          absl::StrCat("push ", a.index, " of worker ", a.worker, " was applied twice"));
    }
    surviving.push_back(a);
  }
  return surviving;
}

void History::AwaitCount(uint64_t count) const {
  absl::MutexLock lock(&mutex_);
  const auto reached = [this, count]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return given_up_ || acknowledgements_.size() >= count;
  };
  mutex_.Await(absl::Condition(&reached));
}

void History::GiveUp() {
  absl::MutexLock lock(&mutex_);
  given_up_ = true;
}

uint64_t History::count() const {
  absl::MutexLock lock(&mutex_);
  return acknowledgements_.size();
}

uint64_t History::replayed() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<uint64_t>(std::count_if(acknowledgements_.begin(), acknowledgements_.end(),
                                             [](const auto& a) { return a.replayed; }));
}

std::pair<uint64_t, uint64_t> History::LastLife() const {
  absl::MutexLock lock(&mutex_);
  std::set<std::pair<int, int>> distinct;
  for (const Acknowledgement& a : acknowledgements_) {
    if (a.version.incarnation == lives_.back().incarnation && a.step > lives_.back().first_step) {
      distinct.emplace(a.worker, a.index);
    }
  }
  return {lives_.back().first_step, distinct.size()};
}

}  // namespace modelstate
