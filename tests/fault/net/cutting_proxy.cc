#include "tests/fault/net/cutting_proxy.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/time/clock.h"

namespace modelstate {
namespace {

constexpr int kPollMilliseconds = 10;

}  // namespace

CuttingProxy::CuttingProxy(int target_port, double bytes_per_second)
    : target_port_(target_port),
      bytes_per_second_(bytes_per_second),
      listener_(std::make_unique<Acceptor>([this](Socket client) { Accept(std::move(client)); })) {}

CuttingProxy::~CuttingProxy() {
  listener_.reset();
  stopping_.Notify();
  std::vector<std::thread> carriers;
  {
    absl::MutexLock lock(&mutex_);
    carriers.swap(carriers_);
  }
  for (std::thread& thread : carriers) thread.join();
}

void CuttingProxy::CutAfter(uint64_t bytes, Cut cut, std::function<void()> then) {
  absl::MutexLock lock(&mutex_);
  until_cut_ = bytes;
  cut_ = cut;
  then_ = std::move(then);
}

void CuttingProxy::Accept(Socket client) {
  if (refusing_) return client.Close();
  Socket server = Socket::Connect(target_port_);
  if (!server.ok()) return client.Close();
  ++connections_;
  absl::MutexLock lock(&mutex_);
  carriers_.emplace_back([this, client = std::move(client), server = std::move(server)]() mutable {
    Carry(std::move(client), std::move(server));
  });
}

void CuttingProxy::Carry(Socket client, Socket server) {
  while (!stopping_.HasBeenNotified()) {
    std::array<pollfd, 2> ready = {{{client.fd(), POLLIN, 0}, {server.fd(), POLLIN, 0}}};
    poll(ready.data(), ready.size(), kPollMilliseconds);
    if (ready[0].revents != 0) {
      const absl::string_view bytes = client.Receive();
      if (bytes.empty() || !server.Send(bytes)) break;
    }
    if (ready[1].revents != 0) {
      const absl::string_view bytes = server.Receive();
      if (bytes.empty() || !Bring(client, server, bytes)) break;
    }
  }
  server.Close();
  client.Close();
}

void CuttingProxy::Pace(size_t size) {
  absl::Time until;
  {
    const auto moves = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !still_; };
    absl::MutexLock lock(&mutex_, absl::Condition(&moves));
    until = std::max(free_at_, absl::Now());
    free_at_ = until + absl::Seconds(static_cast<double>(size) / bytes_per_second_);
  }
  stopping_.WaitForNotificationWithTimeout(until - absl::Now());
}

void CuttingProxy::SetStill(bool still) {
  absl::MutexLock lock(&mutex_);
  still_ = still;
}

bool CuttingProxy::Bring(Socket& client, Socket& server, absl::string_view bytes) {
  std::function<void()> then;
  Cut cut = Cut::kNothing;
  {
    absl::MutexLock lock(&mutex_);
    if (bytes.size() >= until_cut_) {
      bytes = bytes.substr(0, until_cut_);
      until_cut_ = UINT64_MAX;
      cut = cut_;
      then = std::exchange(then_, nullptr);
    } else {
      until_cut_ -= until_cut_ == UINT64_MAX ? 0 : bytes.size();
    }
  }
  Pace(bytes.size());
  bytes_to_clients_ += bytes.size();
  if (!client.Send(bytes)) return false;
  if (then == nullptr) return true;
  SetStill(true);
  then();
  SetStill(false);
  if (cut != Cut::kNothing) server.Reset();
  if (cut == Cut::kBothSides) client.Reset();
  return false;
}

}  // namespace modelstate
