#ifndef MODELSTATE_SERVER_RPC_JOB_HANDLER_H_
#define MODELSTATE_SERVER_RPC_JOB_HANDLER_H_

#include <deque>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/wire/part_codec.h"
#include "server/checkpoint/checkpoint_job.h"
#include "server/rpc/runtime.h"
#include "server/rpc/server_stream_handler.h"

namespace modelstate {

// A call that runs a job on an I/O thread: it answers with the job's progress, then its result.
// Progress is conflated: at most about ten messages a second, the newest, and each phase's first
// and last. A caller that goes cancels the job; the call ends when the job has.
template <typename Request, typename Response>
class JobHandler : public ServerStreamHandler {
 public:
  JobHandler(Runtime* runtime, Call* call) : ServerStreamHandler(call), runtime_(*runtime) {}

 protected:
  // The job. Runs on an I/O thread; calls End once, then or later.
  virtual void Run() = 0;

  // From any thread. `response` has the result, and is only sent when OK.
  void End(absl::Status status, Response response = Response()) {
    {
      absl::MutexLock lock(&mutex_);
      end_ = std::move(status);
      result_ = std::move(response);
    }
    Wake();
  }

  const Request& request() const { return request_; }
  const JobControl& control() const { return control_; }
  // From any thread: the job ends with CANCELLED at its next look, if it has not ended before.
  void CancelJob() { control_.Cancel(); }

  Runtime& runtime_;

 private:
  // Bound before the job begins, and called by it alone.
  struct Reporter {
    JobHandler* handler;
    void operator()(const JobProgress& progress) const { handler->Report(progress); }
  };

  void Report(const JobProgress& progress) {
    {
      absl::MutexLock lock(&mutex_);
      const absl::Time now = absl::Now();
      const bool edge = progress.phase != phase_ || progress.done_bytes == progress.total_bytes;
      if (!edge && now - reported_ < absl::Milliseconds(100)) return;
      phase_ = progress.phase;
      reported_ = now;
      // The first of a phase takes no other's place: the caller sees every phase, in order.
      if (edge || progress_.empty()) {
        progress_.push_back(progress);
      } else {
        progress_.back() = progress;
      }
    }
    Wake();
  }

  absl::Status OnRequest(grpc::ByteBuffer* message) final {
    return ParseRequest(message, &request_);
  }

  Turn Next(grpc::ByteBuffer* message, absl::Status* status) final {
    if (!started_) {
      started_ = true;
      runtime_.PostIo([this, self = Share()] { Run(); });
      return Turn::kWait;
    }
    absl::MutexLock lock(&mutex_);
    if (gone()) {
      if (!end_) return Turn::kWait;
      *status = GoneStatus();
      return Turn::kEnd;
    }
    if (!progress_.empty() && (!end_ || end_->ok())) {
      const JobProgress& first = progress_.front();
      Response response;
      response.mutable_progress()->set_phase(first.phase);
      response.mutable_progress()->set_done_bytes(first.done_bytes);
      response.mutable_progress()->set_total_bytes(first.total_bytes);
      *message = SerializeMessage(response);
      progress_.pop_front();
      return Turn::kMessage;
    }
    if (!end_) return Turn::kWait;
    if (end_->ok() && result_) {
      *message = SerializeMessage(*result_);
      result_.reset();
      return Turn::kMessage;
    }
    *status = *end_;
    return Turn::kEnd;
  }

  void OnCallerGone() final { control_.Cancel(); }

  Request request_;
  const Reporter reporter_{this};
  JobControl control_{reporter_};
  bool started_ = false;  // by turns

  absl::Mutex mutex_;
  const char* phase_ ABSL_GUARDED_BY(mutex_) = nullptr;
  absl::Time reported_ ABSL_GUARDED_BY(mutex_);
  std::deque<JobProgress> progress_ ABSL_GUARDED_BY(mutex_);  // what is to be told
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  std::optional<Response> result_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_JOB_HANDLER_H_
