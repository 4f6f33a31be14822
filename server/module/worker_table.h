#ifndef MODELSTATE_SERVER_MODULE_WORKER_TABLE_H_
#define MODELSTATE_SERVER_MODULE_WORKER_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/optim/step.h"
#include "server/state/step_record.h"

namespace modelstate {

struct WorkerLimits {
  size_t max_workers = 10'000;
  absl::Duration expiry = absl::Hours(24);
};

// What a module remembers of each worker: the answer to its last push, so that a repeat is
// harmless, and the gradients that wait for its next step. Bounded: a worker that was silent for
// WorkerLimits::expiry is forgotten, unless it waits in a round. Thread-compatible; owned by the
// module's strand.
class WorkerTable {
 public:
  struct Worker {
    std::optional<WorkerRecord> last;  // the answer to a repeat
    // The last one whose step is in the published state, or was skipped: what a checkpoint keeps. A
    // push that waits in a round or is accumulated is lost with the server, so it must be pushed
    // again after that, and no record may say that it was seen.
    std::optional<WorkerRecord> durable;
    std::optional<GradientSet> accumulated;  // their sum
    uint32_t accumulated_count = 0;          // pushes
    bool in_round = false;

    // Of a contribution that does not count: what had been accumulated goes on waiting.
    void TakeBack(Contribution& contribution);

   private:
    friend class WorkerTable;
    absl::Time last_seen;
    std::list<std::string>::iterator place;  // in by_age_
  };

  // `module` is named in errors.
  WorkerTable(std::string module, WorkerLimits limits)
      : module_(std::move(module)), limits_(limits) {}

  // The answer to (worker, sequence) when that is the worker's last push; nullopt when it is new.
  // `payload_digest` null: a header alone. ABORTED SEQUENCE_REUSED: a lower sequence, or the same
  // with another payload. Who asks is seen at `now`.
  absl::StatusOr<std::optional<StepAnswer>> FindAnswer(const std::string& worker, uint64_t sequence,
                                                       const std::string* payload_digest,
                                                       absl::Time now);

  Worker* Find(const std::string& worker);  // null: not known
  // Whether a worker that is not known can be: RESOURCE_EXHAUSTED WORKER_LIMIT, with the time after
  // which another is forgotten if it stays silent.
  absl::Status CheckRoom(const std::string& worker, absl::Time now);
  // Makes the worker known, and seen at `now`. As CheckRoom.
  absl::StatusOr<Worker*> Admit(const std::string& worker, absl::Time now);
  // It is not silent at `now`: it has sent something, or its round has ended.
  void Touch(Worker& worker, absl::Time now);
  // A push that failed leaves no trace of a worker that was not known before it.
  void RemoveIfNew(const std::string& worker);

  void ExpireIdle(absl::Time now);
  // Forgets what waits: last becomes durable, and nothing is accumulated.
  void DropPending();
  // The same for each worker whose accumulated gradients `keep` is false for.
  void DropAccumulatedUnless(absl::FunctionRef<bool(GradientSet&)> keep);

  WorkerRecords Durable() const;
  void Restore(WorkerRecords records, absl::Time now);

  size_t size() const { return workers_.size(); }
  const WorkerLimits& limits() const { return limits_; }

 private:
  using Workers = std::map<std::string, Worker>;

  const std::string module_;
  const WorkerLimits limits_;
  Workers workers_;
  std::list<std::string> by_age_;  // names; the longest silent first
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_WORKER_TABLE_H_
