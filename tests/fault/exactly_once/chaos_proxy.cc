#include "tests/fault/exactly_once/chaos_proxy.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace modelstate {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {
    const int on = 1;
    setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    const timeval patience{5, 0};
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  }
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Socket() { Reset(); }

  // Closes with a reset, as a connection that is cut, not one that is ended.
  void Reset() {
    if (fd_ < 0) return;
    const linger abort{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &abort, sizeof(abort));
    close(std::exchange(fd_, -1));
  }
  bool Send(absl::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }
  // Empty: the peer has ended.
  absl::string_view Receive(int flags = 0) {
    const ssize_t received = recv(fd_, buffer_.data(), buffer_.size(), flags);
    return absl::string_view(buffer_.data(), received > 0 ? static_cast<size_t>(received) : 0);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
  std::array<char, 16384> buffer_;
};

}  // namespace

class ChaosProxy::Connection {
 public:
  Connection(ChaosProxy* proxy, int client, int server, const std::mt19937_64& random)
      : proxy_(*proxy), client_(client), server_(server), random_(random) {
    Draw();
  }

  void Run() {
    while (!proxy_.stopping_ && absl::Now() < end_) {
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
    absl::SleepFor(absl::Milliseconds(Uniform(max_milliseconds + 1)));
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
    : seed_(seed), mean_bytes_(mean_bytes), listeners_(static_cast<size_t>(listeners)) {
  for (Listener& listener : listeners_) {
    listener.socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = Loopback(0);
    socklen_t size = sizeof(address);
    if (bind(listener.socket, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
        listen(listener.socket, 64) != 0 ||
        getsockname(listener.socket, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
      std::perror("chaos proxy");
      std::abort();
    }
    listener.port = ntohs(address.sin_port);
  }
  for (int i = 0; i < listeners; ++i) acceptors_.emplace_back([this, i] { Accept(i); });
}

ChaosProxy::~ChaosProxy() {
  stopping_ = true;
  for (std::thread& thread : acceptors_) thread.join();
  std::vector<std::thread> running;
  {
    absl::MutexLock lock(&mutex_);
    running.swap(running_);
  }
  for (std::thread& thread : running) thread.join();
  for (const Listener& listener : listeners_) close(listener.socket);
}

std::string ChaosProxy::address(int listener) const {
  return absl::StrCat("127.0.0.1:", listeners_[static_cast<size_t>(listener)].port);
}

void ChaosProxy::Accept(int listener) {
  const int socket_of_listener = listeners_[static_cast<size_t>(listener)].socket;
  for (uint64_t count = 0; !stopping_;) {
    pollfd ready{socket_of_listener, POLLIN, 0};
    if (poll(&ready, 1, 10) <= 0) continue;
    const int client = accept4(socket_of_listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (client < 0) continue;
    const sockaddr_in address = Loopback(target_);
    const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      close(server);
      close(client);
      continue;
    }
    ++connections_;
    std::seed_seq seed{seed_, static_cast<uint64_t>(listener), count++};
    auto connection = std::make_unique<Connection>(this, client, server, std::mt19937_64(seed));
    absl::MutexLock lock(&mutex_);
    running_.emplace_back([connection = std::move(connection)] { connection->Run(); });
  }
}

}  // namespace modelstate
