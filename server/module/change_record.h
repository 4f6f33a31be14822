#ifndef MODELSTATE_SERVER_MODULE_CHANGE_RECORD_H_
#define MODELSTATE_SERVER_MODULE_CHANGE_RECORD_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

namespace modelstate {

// The numbers of the versions in which a parameter's elements changed: what says how stale the base
// of a push is. Kept as runs of consecutive numbers, because a module that trains makes one change
// per version; bounded, so that a module that freezes between any two steps does not grow.
// Thread-compatible.
class ChangeRecord {
 public:
  explicit ChangeRecord(size_t max_runs = 4096) : max_runs_(max_runs) {}

  // REQUIRES: `number` is above all that were added.
  void Add(uint64_t number) {
    if (!runs_.empty() && runs_.back().last + 1 == number) {
      runs_.back().last = number;
    } else {
      runs_.push_back({number, number, total_});
    }
    ++total_;
    if (runs_.size() > max_runs_) {
      forgotten_ = runs_.front().last;
      runs_.pop_front();
    }
  }

  // How many numbers above `base` were added. nullopt: `base` is older than the runs that are kept,
  // so there were more than that many; a caller takes it for too old whatever its limit is.
  std::optional<uint64_t> CountAfter(uint64_t base) const {
    if (base < forgotten_) return std::nullopt;
    size_t low = 0;  // the first run that ends above base
    size_t high = runs_.size();
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (runs_[middle].last > base) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (low == runs_.size()) return 0;
    const Run& run = runs_[low];
    const uint64_t not_after = base < run.first ? 0 : base - run.first + 1;
    return total_ - run.before - not_after;
  }

  uint64_t total() const { return total_; }

 private:
  struct Run {
    uint64_t first;
    uint64_t last;
    uint64_t before;  // how many numbers are in earlier runs, the forgotten ones too
  };

  size_t max_runs_;
  std::deque<Run> runs_;
  uint64_t forgotten_ = 0;  // the highest number that is no longer in a run
  uint64_t total_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_CHANGE_RECORD_H_
