#include "server/rpc/health.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/wire/part_codec.h"

namespace modelstate {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

grpc::ByteBuffer Response(Health::Status status) {
  HealthCheckResponse response;
  response.set_status(status);
  return SerializeMessage(response);
}

class CheckHandler final : public CallHandler {
 public:
  CheckHandler(Health* health, Call* call) : health_(*health), call_(*call) {}

 private:
  void OnMessage(grpc::ByteBuffer* message) override {
    HealthCheckRequest request;
    if (absl::Status status = ParseRequest(message, &request); !status.ok()) {
      return call_.Finish(status);
    }
    const Health::Status status = health_.Get(request.service());
    if (status != HealthCheckResponse::SERVICE_UNKNOWN) return call_.FinishWith(Response(status));
    call_.Finish(absl::NotFoundError(
        absl::StrCat("there is neither a service nor a module named \"", request.service(), "\"")));
  }
  void OnEnd() override {
    call_.Finish(absl::InvalidArgumentError("the call ended without its request message"));
  }

  Health& health_;
  Call& call_;
};

class WatchHandler final : public ServerStreamHandler {
 public:
  WatchHandler(Health* health, Call* call) : ServerStreamHandler(call), health_(*health) {}

 private:
  absl::Status OnRequest(grpc::ByteBuffer* message) override {
    if (absl::Status status = ParseRequest(message, &request_); !status.ok()) return status;
    health_.Join(this);
    return absl::OkStatus();
  }
  Turn Next(grpc::ByteBuffer* message, absl::Status* status) override {
    if (gone()) {
      *status = GoneStatus();
      return Turn::kEnd;
    }
    const Health::Status current = health_.Get(request_.service());
    if (sent_ == current) return Turn::kWait;
    sent_ = current;
    *message = Response(current);
    return Turn::kMessage;
  }
  void OnOver() override { health_.Leave(this); }

  Health& health_;
  HealthCheckRequest request_;
  std::optional<Health::Status> sent_;  // by turns
};

template <typename Handler>
Call::Method HealthMethod(const char* name, Health* health) {
  Call::Method method;
  method.path = absl::StrCat("/grpc.health.v1.Health/", name);
  method.admitted = false;
  method.make_handler = [health](Call* call) {
    return RefPtr<CallHandler>::Adopt(new Handler(health, call));
  };
  return method;
}

}  // namespace

std::vector<Call::Method> Health::methods() {
  return {HealthMethod<CheckHandler>("Check", this), HealthMethod<WatchHandler>("Watch", this)};
}

void Health::SetServing(const std::string& service, bool serving) {
  {
    absl::MutexLock lock(&mutex_);
    serving_[service] = serving;
  }
  WakeAll();
}

void Health::Shutdown() {
  {
    absl::MutexLock lock(&mutex_);
    shut_down_ = true;
  }
  WakeAll();
}

Health::Status Health::Get(const std::string& service) const {
  absl::MutexLock lock(&mutex_);
  const auto found = serving_.find(service);
  if (found == serving_.end()) return HealthCheckResponse::SERVICE_UNKNOWN;
  return found->second && !shut_down_ ? HealthCheckResponse::SERVING
                                      : HealthCheckResponse::NOT_SERVING;
}

void Health::Join(ServerStreamHandler* watcher) {
  absl::MutexLock lock(&mutex_);
  watchers_.insert(watcher);
}

void Health::Leave(ServerStreamHandler* watcher) {
  absl::MutexLock lock(&mutex_);
  watchers_.erase(watcher);
}

void Health::WakeAll() {
  std::vector<RefPtr<ServerStreamHandler>> woken;
  {
    absl::MutexLock lock(&mutex_);
    for (ServerStreamHandler* watcher : watchers_) {
      watcher->Ref();
      woken.push_back(RefPtr<ServerStreamHandler>::Adopt(watcher));
    }
  }
  for (const RefPtr<ServerStreamHandler>& watcher : woken) watcher->Wake();
}

}  // namespace modelstate
