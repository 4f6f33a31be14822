#ifndef MODELSTATE_SERVER_MODULE_STEP_ROUND_H_
#define MODELSTATE_SERVER_MODULE_STEP_ROUND_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/optimizer_config.h"
#include "server/optim/step.h"
#include "server/state/step_record.h"

namespace modelstate {

// What is shown of a round that is open.
struct RoundInfo {
  std::vector<std::string> workers;  // the first 100 in name order
  uint32_t contributions = 0;        // 0: no round is open
  uint64_t staged_bytes = 0;
  absl::Time open_time;
};

// Contributions that wait for a quorum of distinct workers. It keeps all of them until it closes,
// because they are added in the order of worker names, which is known only then. Thread-compatible;
// owned by the module's strand.
class StepRound {
 public:
  using Waiter = absl::AnyInvocable<void(absl::StatusOr<StepAnswer>)>;

  // A call that waits for the answer.
  struct Waiting {
    const void* call = nullptr;  // which one: for EndWait
    bool replayed = false;       // StepAnswer::replayed
    Waiter answer;
  };

  struct Member {
    Contribution contribution;
    uint64_t ignored = 0;  // StepAnswer::ignored
    // What was known of the worker before: for when the contribution does not count after all.
    std::optional<WorkerRecord> record_before;
    uint32_t accumulated_before = 0;
    std::vector<Waiting> waiting;

    // Answers all that wait.
    void Answer(const absl::StatusOr<StepAnswer>& answer);
  };

  bool empty() const { return members_.empty(); }
  uint32_t size() const { return static_cast<uint32_t>(members_.size()); }
  std::map<std::string, Member>& members() { return members_; }
  const std::vector<GroupOverride>& overrides() const { return overrides_; }

  // Whether a contribution with these overrides can join: they are those of the others, or none.
  // INVALID_ARGUMENT OVERRIDE_CONFLICT.
  absl::Status CheckOverrides(const std::vector<GroupOverride>& overrides) const;
  // Whether a contribution of this weight can join. INVALID_ARGUMENT INVALID_FIELD: the sum of the
  // weights would not be finite.
  absl::Status CheckWeight(double weight) const;

  // REQUIRES: the worker is not a member; CheckOverrides.
  void Add(const std::string& worker, Member member, const std::vector<GroupOverride>& overrides,
           absl::Time now);
  // Takes back what Add did.
  Member Remove(const std::string& worker);

  // REQUIRES: the worker is a member.
  void Wait(const std::string& worker, Waiting waiting);
  // Answers with `status` the call that waits, if it does still.
  void EndWait(const std::string& worker, const void* call, const absl::Status& status);

  // Enough of them, or, after the timeout, enough for that.
  bool IsComplete(const Rounds& rounds, absl::Time now) const;

  RoundInfo Info() const;

 private:
  std::map<std::string, Member> members_;
  std::vector<GroupOverride> overrides_;  // of the members that have any
  std::string overrides_from_;
  absl::Time open_time_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_STEP_ROUND_H_
