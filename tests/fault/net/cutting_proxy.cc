#include "tests/fault/net/cutting_proxy.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace modelstate {
namespace {

constexpr int kPollMilliseconds = 10;

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

bool SendAll(int fd, const char* bytes, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, bytes, size, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes += sent;
    size -= static_cast<size_t>(sent);
  }
  return true;
}

void Reset(int fd) {
  const linger abort{1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &abort, sizeof(abort));
}

}  // namespace

CuttingProxy::CuttingProxy(int target_port, double bytes_per_second)
    : target_port_(target_port), bytes_per_second_(bytes_per_second) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener_, 64) != 0 ||
      getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    std::perror("cutting proxy");
    std::abort();
  }
  port_ = ntohs(address.sin_port);
  acceptor_ = std::thread([this] { Accept(); });
}

CuttingProxy::~CuttingProxy() {
  stopping_ = true;
  acceptor_.join();
  std::vector<std::thread> carriers;
  {
    absl::MutexLock lock(&mutex_);
    carriers.swap(carriers_);
  }
  for (std::thread& thread : carriers) thread.join();
  close(listener_);
}

std::string CuttingProxy::address() const { return absl::StrCat("127.0.0.1:", port_); }

void CuttingProxy::CutAfter(uint64_t bytes, Cut cut, std::function<void()> then) {
  absl::MutexLock lock(&mutex_);
  until_cut_ = bytes;
  cut_ = cut;
  then_ = std::move(then);
}

void CuttingProxy::Accept() {
  while (!stopping_) {
    pollfd ready{listener_, POLLIN, 0};
    if (poll(&ready, 1, kPollMilliseconds) <= 0) continue;
    const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (client < 0) continue;
    if (refusing_) {
      close(client);
      continue;
    }
    const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in address = Loopback(target_port_);
    if (connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      close(server);
      close(client);
      continue;
    }
    ++connections_;
    absl::MutexLock lock(&mutex_);
    carriers_.emplace_back([this, client, server] { Carry(client, server); });
  }
}

void CuttingProxy::Carry(int client, int server) {
  for (const int fd : {client, server}) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    const timeval patience{5, 0};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  }
  std::array<char, 65536> buffer;
  while (!stopping_) {
    std::array<pollfd, 2> ready = {{{client, POLLIN, 0}, {server, POLLIN, 0}}};
    poll(ready.data(), ready.size(), kPollMilliseconds);
    if (ready[0].revents != 0) {
      const ssize_t got = recv(client, buffer.data(), buffer.size(), 0);
      if (got <= 0 || !SendAll(server, buffer.data(), static_cast<size_t>(got))) break;
    }
    if (ready[1].revents != 0) {
      const ssize_t got = recv(server, buffer.data(), buffer.size(), 0);
      if (got <= 0 || !Bring(client, server, buffer.data(), static_cast<size_t>(got))) break;
    }
  }
  close(server);
  close(client);
}

void CuttingProxy::Pace(size_t size) {
  absl::Time until;
  {
    absl::MutexLock lock(&mutex_);
    until = std::max(free_at_, absl::Now());
    free_at_ = until + absl::Seconds(static_cast<double>(size) / bytes_per_second_);
  }
  absl::SleepFor(until - absl::Now());
}

bool CuttingProxy::Bring(int client, int server, const char* bytes, size_t size) {
  std::function<void()> then;
  Cut cut = Cut::kNothing;
  {
    absl::MutexLock lock(&mutex_);
    if (size >= until_cut_) {
      size = until_cut_;
      until_cut_ = UINT64_MAX;
      cut = cut_;
      then = std::exchange(then_, nullptr);
    } else {
      until_cut_ -= until_cut_ == UINT64_MAX ? 0 : size;
    }
  }
  Pace(size);
  bytes_to_clients_ += size;
  if (!SendAll(client, bytes, size)) return false;
  if (then == nullptr) return true;
  then();
  if (cut != Cut::kNothing) Reset(server);
  if (cut == Cut::kBothSides) Reset(client);
  return false;
}

}  // namespace modelstate
