#ifndef MODELSTATE_CLIENT_CONNECTION_H_
#define MODELSTATE_CLIENT_CONNECTION_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/backoff.h"
#include "client/client.h"
#include "client/target.h"
#include "common/wire/status_mapping.h"
#include "modelstate/v1/service.grpc.pb.h"

// Internal to the library: not installed.
namespace modelstate::client {

class Cancellation::Registry {
 public:
  explicit Registry(absl::Time deadline) : deadline_(deadline) {}

  void Cancel();
  bool cancelled() const;
  void Add(grpc::ClientContext* context);
  void Remove(grpc::ClientContext* context);

 private:
  const absl::Time deadline_;
  mutable absl::Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mutex_);
};

// Ties a call to a Cancellation (which may be null) for the scope's life.
class CancellationScope {
 public:
  CancellationScope(Cancellation* cancellation, grpc::ClientContext* context)
      : cancellation_(cancellation), context_(context) {
    if (cancellation_ != nullptr) cancellation_->registry().Add(context_);
  }
  ~CancellationScope() {
    if (cancellation_ != nullptr) cancellation_->registry().Remove(context_);
  }
  CancellationScope(const CancellationScope&) = delete;
  CancellationScope& operator=(const CancellationScope&) = delete;

 private:
  Cancellation* const cancellation_;
  grpc::ClientContext* const context_;
};

// A channel with its stub. Thread-safe.
class Connection {
 public:
  // Connects at the first call. `own`: shares no TCP connection with others to the same target.
  Connection(Target target, ClientOptions options, bool own);

  const Target& target() const { return target_; }
  const ClientOptions& options() const { return options_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  v1::ModelState::Stub& stub() const { return *stub_; }

  template <typename Request, typename Response>
  using Method = grpc::Status (v1::ModelState::Stub::*)(grpc::ClientContext*, const Request&,
                                                        Response*);

  // A unary call, repeated on transient failures when it is `idempotent`. `cancellation` may be
  // null.
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(Method<Request, Response> method, const Request& request,
                                bool idempotent, Cancellation* cancellation = nullptr) const {
    Backoff backoff(options_);
    while (true) {
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
      const CancellationScope scope(cancellation, &context);  // its deadline, where that is sooner
      Response response;
      absl::Status status = FromGrpcStatus((stub_.get()->*method)(&context, request, &response));
      if (status.ok()) return response;
      if (!idempotent || !backoff.WaitBeforeRetry(status, cancellation)) return status;
    }
  }

 private:
  const Target target_;
  const ClientOptions options_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::ModelState::Stub> stub_;
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_CONNECTION_H_
