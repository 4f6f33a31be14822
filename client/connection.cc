#include "client/connection.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/random/random.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/wire/transport_tuning.h"

namespace modelstate::client {

Cancellation::Cancellation(absl::Time deadline) : registry_(std::make_unique<Registry>(deadline)) {}
Cancellation::~Cancellation() = default;
void Cancellation::Cancel() { registry_->Cancel(); }
bool Cancellation::cancelled() const { return registry_->cancelled(); }

void Cancellation::Registry::Cancel() {
  absl::MutexLock lock(&mutex_);
  cancelled_ = true;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
}

bool Cancellation::Registry::cancelled() const {
  absl::MutexLock lock(&mutex_);
  return cancelled_ || absl::Now() >= deadline_;
}

void Cancellation::Registry::Add(grpc::ClientContext* context) {
  if (deadline_ < absl::FromChrono(context->deadline())) {
    context->set_deadline(absl::ToChronoTime(deadline_));
  }
  absl::MutexLock lock(&mutex_);
  contexts_.insert(context);
  // A call that starts after this is cancelled as it starts.
  if (cancelled_) context->TryCancel();
}

void Cancellation::Registry::Remove(grpc::ClientContext* context) {
  absl::MutexLock lock(&mutex_);
  contexts_.erase(context);
}

namespace {

std::shared_ptr<grpc::Channel> MakeChannel(const Target& target, const ClientOptions& options,
                                           bool own) {
  // gRPC's own are a second that grows to two minutes: a server that is back would be found late.
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000);  // to connect in
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  if (!target.authority.empty()) {
    arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, target.authority);
  }
  if (own) arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  SetTransportProfile(ProfileForTarget(options.transport_profile, target.first), &arguments);
  return grpc::CreateCustomChannel(target.uri, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

Connection::Connection(Target target, ClientOptions options, bool own)
    : target_(std::move(target)),
      options_(options),
      channel_(MakeChannel(target_, options_, own)),
      stub_(v1::ModelState::NewStub(channel_)) {}

bool IsTransient(const absl::Status& status) {
  return absl::IsUnavailable(status) || GetRetryAfter(status).has_value();
}

bool Backoff::WaitBeforeRetry(const absl::Status& status, Cancellation* cancellation) {
  return IsTransient(status) && Wait(status, cancellation);
}

bool Backoff::Wait(const absl::Status& status, Cancellation* cancellation) {
  if (attempts_ >= max_attempts_ || absl::Now() >= deadline_) return false;
  ++attempts_;
  absl::BitGen random;
  absl::Duration wait = delay_ * absl::Uniform(random, 0.5, 1.0);
  if (std::optional<absl::Duration> hint = GetRetryAfter(status)) wait = std::max(wait, *hint);
  wait = std::min(wait, max_);
  delay_ = std::min(delay_ * 2, max_);
  const absl::Time end = absl::Now() + wait;
  while (absl::Now() < end) {
    if (cancellation != nullptr && cancellation->cancelled()) return false;
    absl::SleepFor(std::min(end - absl::Now(), absl::Milliseconds(50)));
  }
  return true;
}

}  // namespace modelstate::client
