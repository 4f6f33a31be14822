#include "server/module/worker_table.h"

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {

void WorkerTable::Worker::TakeBack(Contribution& contribution) {
  if (contribution.parts.size() < 2) return;
  accumulated = std::move(contribution.parts.front().gradients);
}

absl::StatusOr<std::optional<StepAnswer>> WorkerTable::FindAnswer(const std::string& worker,
                                                                  uint64_t sequence,
                                                                  const std::string* payload_digest,
                                                                  absl::Time now) {
  Worker* known = Find(worker);
  if (known != nullptr) Touch(*known, now);
  if (known == nullptr || !known->last || sequence > known->last->sequence) {
    return std::optional<StepAnswer>();
  }
  const WorkerRecord& record = *known->last;
  const ErrorMetadata metadata{{"module", module_},
                               {"worker", worker},
                               {"sequence", absl::StrCat(sequence)},
                               {"last_sequence", absl::StrCat(record.sequence)}};
  // The last sequence there is has none after it.
  const std::string next =
      record.sequence == std::numeric_limits<uint64_t>::max()
          ? absl::StrCat(
                "use another worker name, as the sequences of this one are used up (or "
                "this one when it has been silent for ",
                absl::FormatDuration(limits_.expiry), " and is forgotten)")
          : absl::StrCat("go on with ", record.sequence + 1);
  if (sequence < record.sequence) {
    return MakeError(Reason::kSequenceReused,
                     absl::StrCat("worker \"", worker, "\" sent sequence ", sequence,
                                  " after its sequence ", record.sequence, " was decided; ", next),
                     metadata);
  }
  if (payload_digest != nullptr && *payload_digest != record.payload_digest) {
    return MakeError(Reason::kSequenceReused,
                     absl::StrCat("worker \"", worker, "\" sent sequence ", sequence,
                                  " again with another payload; a repeat must be the same bytes; "
                                  "for a new step ",
                                  next),
                     metadata);
  }
  StepAnswer answer = record.answer;
  answer.replayed = true;
  return std::optional<StepAnswer>(std::move(answer));
}

WorkerTable::Worker* WorkerTable::Find(const std::string& worker) {
  const auto it = workers_.find(worker);
  return it == workers_.end() ? nullptr : &it->second;
}

void WorkerTable::Touch(Worker& worker, absl::Time now) {
  worker.last_seen = now;
  by_age_.splice(by_age_.end(), by_age_, worker.place);
}

absl::Status WorkerTable::CheckRoom(const std::string& worker, absl::Time now) {
  ExpireIdle(now);
  if (workers_.size() < limits_.max_workers) return absl::OkStatus();
  // Those that wait in a round stay, however long it is open.
  const Worker* idle = nullptr;
  size_t in_round = 0;
  for (const std::string& name : by_age_) {
    const Worker& known = workers_.at(name);
    if (known.in_round) {
      ++in_round;
    } else if (idle == nullptr) {
      idle = &known;
    }
  }
  const absl::Duration wait =
      (idle == nullptr ? now : idle->last_seen) + limits_.expiry - now + absl::Seconds(1);
  const std::string waiting =
      in_round == 0 ? ""
                    : absl::StrCat("; ", in_round, " of them ", in_round == 1 ? "waits" : "wait",
                                   " in the open round, which is no silence");
  return WithRetryAfter(
      MakeError(Reason::kWorkerLimit,
                absl::StrCat("module \"", module_, "\" remembers ", workers_.size(),
                             " workers, as many as it may; worker \"", worker,
                             "\" can join when one has been silent for ",
                             absl::FormatDuration(limits_.expiry), waiting,
                             "; use names again, or raise the server's --max_workers"),
                {{"module", module_}, {"worker", worker}}),
      wait);
}

absl::StatusOr<WorkerTable::Worker*> WorkerTable::Admit(const std::string& worker, absl::Time now) {
  if (Worker* known = Find(worker)) {
    Touch(*known, now);
    return known;
  }
  MS_RETURN_IF_ERROR(CheckRoom(worker, now));
  Worker& fresh = workers_[worker];
  fresh.place = by_age_.insert(by_age_.end(), worker);
  fresh.last_seen = now;
  return &fresh;
}

void WorkerTable::RemoveIfNew(const std::string& worker) {
  const auto it = workers_.find(worker);
  if (it == workers_.end() || it->second.last || it->second.in_round || it->second.accumulated) {
    return;
  }
  by_age_.erase(it->second.place);
  workers_.erase(it);
}

void WorkerTable::ExpireIdle(absl::Time now) {
  for (auto it = by_age_.begin(); it != by_age_.end();) {
    const auto worker = workers_.find(*it);
    if (worker->second.last_seen + limits_.expiry > now) return;
    if (worker->second.in_round) {
      ++it;
      continue;
    }
    it = by_age_.erase(it);
    workers_.erase(worker);
  }
}

void WorkerTable::DropPending() {
  for (auto it = workers_.begin(); it != workers_.end();) {
    Worker& worker = it->second;
    worker.last = worker.durable;
    worker.accumulated.reset();
    worker.accumulated_count = 0;
    worker.in_round = false;
    if (worker.last) {
      ++it;
      continue;
    }
    by_age_.erase(worker.place);
    it = workers_.erase(it);
  }
}

void WorkerTable::DropAccumulatedUnless(absl::FunctionRef<bool(GradientSet&)> keep) {
  for (auto& [name, worker] : workers_) {
    if (!worker.accumulated || keep(*worker.accumulated)) continue;
    worker.last = worker.durable;
    worker.accumulated.reset();
    worker.accumulated_count = 0;
  }
}

WorkerRecords WorkerTable::Durable() const {
  WorkerRecords records;
  for (const auto& [name, worker] : workers_) {
    if (worker.durable) records.emplace_hint(records.end(), name, *worker.durable);
  }
  return records;
}

void WorkerTable::Restore(WorkerRecords records, absl::Time now) {
  workers_.clear();
  by_age_.clear();
  for (auto& [name, record] : records) {
    Worker& worker = workers_[name];
    worker.place = by_age_.insert(by_age_.end(), name);
    worker.last_seen = now;
    worker.last = record;
    worker.durable = std::move(record);
  }
}

}  // namespace modelstate
