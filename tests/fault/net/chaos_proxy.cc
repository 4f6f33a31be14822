#include "tests/fault/net/chaos_proxy.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace modelstate {

class ChaosProxy::Connection {
 public:
  Connection(ChaosProxy* proxy, Socket client, Socket server, const std::mt19937_64& random)
      : proxy_(*proxy), client_(std::move(client)), server_(std::move(server)), random_(random) {
    Draw();
  }

  void Run() {
    while (!proxy_.stopping_.HasBeenNotified() && absl::Now() < end_) {
      std::array<pollfd, 2> ready = {{{client_.fd(), POLLIN, 0}, {server_.fd(), POLLIN, 0}}};
      poll(ready.data(), ready.size(), 10);
      if (ready[0].revents != 0 && !Upstream(client_.Receive())) return;
      if (ready[1].revents != 0) {
        const absl::string_view bytes = server_.Receive();
        if (bytes.empty() || (!answers_lost_ && !client_.Send(bytes))) return;
      }
    }
  }

 private:
  uint64_t Uniform(uint64_t bound) { return random_() % bound; }
  void Draw() {
    fault_ = static_cast<Fault>(Uniform(kFaultKinds));
    until_fault_ = 1 + Uniform(2 * proxy_.mean_bytes_);
  }
  void Wait(uint64_t max_milliseconds) {
    proxy_.stopping_.WaitForNotificationWithTimeout(
        absl::Milliseconds(Uniform(max_milliseconds + 1)));
  }

  bool Upstream(absl::string_view bytes) {
    if (bytes.empty()) return false;
    if (Uniform(8) == 0) Wait(3);
    if (answers_lost_ || bytes.size() < until_fault_) {
      until_fault_ -= std::min<uint64_t>(until_fault_, bytes.size());
      return server_.Send(bytes);
    }
    ++proxy_.faults_[static_cast<size_t>(fault_)];
    if (!server_.Send(bytes.substr(0, until_fault_))) return false;
    return Strike(bytes.substr(until_fault_));
  }

  // `rest` follows on what the server has got.
  bool Strike(absl::string_view rest) {
    switch (fault_) {
      case Fault::kCut:
        return false;
      case Fault::kAnswerLost:
        answers_lost_ = true;
        end_ = absl::Now() + absl::Milliseconds(5 + Uniform(50));
        return server_.Send(rest);
      case Fault::kLateCopy: {
        std::string late(rest);
        absl::string_view more;
        while (!(more = client_.Receive(MSG_DONTWAIT)).empty()) absl::StrAppend(&late, more);
        client_.Reset();
        Wait(50);
        if (server_.Send(late)) Wait(50);
        return false;
      }
      case Fault::kSilence:
        Wait(100);
        Draw();
        return server_.Send(rest);
    }
    return false;
  }

  ChaosProxy& proxy_;
  Socket client_;
  Socket server_;
  std::mt19937_64 random_;
  Fault fault_ = Fault::kCut;
  uint64_t until_fault_ = 0;
  bool answers_lost_ = false;
  absl::Time end_ = absl::InfiniteFuture();
};

ChaosProxy::ChaosProxy(uint64_t seed, int listeners, uint64_t mean_bytes)
    : seed_(seed), mean_bytes_(mean_bytes), accepted_(static_cast<size_t>(listeners)) {
  for (size_t i = 0; i < accepted_.size(); ++i) {
    listeners_.push_back(
        std::make_unique<Acceptor>([this, i](Socket client) { Accept(i, std::move(client)); }));
  }
}

ChaosProxy::~ChaosProxy() {
  listeners_.clear();
  stopping_.Notify();
  std::vector<std::thread> running;
  {
    absl::MutexLock lock(&mutex_);
    running.swap(running_);
  }
  for (std::thread& thread : running) thread.join();
}

void ChaosProxy::Accept(size_t listener, Socket client) {
  Socket server = Socket::Connect(target_);
  if (!server.ok()) return client.Close();
  ++connections_;
  std::seed_seq seed{seed_, uint64_t{listener}, accepted_[listener]++};
  auto connection = std::make_unique<Connection>(this, std::move(client), std::move(server),
                                                 std::mt19937_64(seed));
  absl::MutexLock lock(&mutex_);
  running_.emplace_back([connection = std::move(connection)] { connection->Run(); });
}

}  // namespace modelstate
