#ifndef MODELSTATE_TESTS_FAULT_EXACTLY_ONCE_HISTORY_H_
#define MODELSTATE_TESTS_FAULT_EXACTLY_ONCE_HISTORY_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/base/tensor_spec.h"

namespace modelstate {

// What workers were told: push `index` of `worker` is step `step` of the module in the life of the
// server that `version` names.
struct Acknowledgement {
  int worker = 0;
  int index = 0;
  Version version;
  uint64_t step = 0;
  bool replayed = false;
};

// Puts together, from acknowledgements of several lives of a server, which pushes its state is made
// of: a life begins with the steps of the save that it loaded, and all later ones of the lives
// before it are gone. Thread-safe.
class History {
 public:
  // A life that begins from `step`, in the order of lives.
  void BeginLife(const Version& version, uint64_t step);
  void Add(const Acknowledgement& acknowledgement);

  // In the order of steps. `problems` gets what cannot be where each push is applied once: one step
  // that is two pushes, a push that is two steps of the state, a step that nobody was told of.
  std::vector<Acknowledgement> Surviving(std::vector<std::string>* problems) const;

  // Pushes that were acknowledged, counting again those that were lost and made again.
  void AwaitCount(uint64_t count) const;
  void GiveUp();  // there will be no more: AwaitCount returns
  uint64_t count() const;
  uint64_t replayed() const;
  // Of the last life: the step it began from, and how many distinct pushes were acknowledged in it.
  std::pair<uint64_t, uint64_t> LastLife() const;

 private:
  struct Life {
    uint64_t incarnation;
    uint64_t first_step;
  };
  mutable absl::Mutex mutex_;
  std::vector<Life> lives_ ABSL_GUARDED_BY(mutex_);
  bool given_up_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<Acknowledgement> acknowledgements_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAULT_EXACTLY_ONCE_HISTORY_H_
