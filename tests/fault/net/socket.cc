#include "tests/fault/net/socket.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"

namespace modelstate {
namespace {

constexpr int kPollMilliseconds = 10;
constexpr size_t kBufferBytes = 65536;

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

}  // namespace

Socket::Socket(int fd) : fd_(fd) {
  if (!ok()) return;
  buffer_.resize(kBufferBytes);
  const int on = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  const timeval patience{5, 0};
  setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
}

Socket::Socket(Socket&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), buffer_(std::move(other.buffer_)) {}

Socket Socket::Connect(int port) {
  const sockaddr_in address = Loopback(port);
  Socket server(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(server.fd(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return Socket(-1);
  }
  return server;
}

bool Socket::Send(absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

absl::string_view Socket::Receive(int flags) {
  const ssize_t received = recv(fd_, buffer_.data(), buffer_.size(), flags);
  return absl::string_view(buffer_.data(), received > 0 ? static_cast<size_t>(received) : 0);
}

void Socket::Reset() {
  if (!ok()) return;
  const linger abort{1, 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &abort, sizeof(abort));
  Close();
}

void Socket::Close() {
  if (ok()) close(std::exchange(fd_, -1));
}

Acceptor::Acceptor(std::function<void(Socket)> on_connection)
    : on_connection_(std::move(on_connection)),
      listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener_, 64) != 0 ||
      getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    std::perror("acceptor");
    std::abort();
  }
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { Run(); });
}

Acceptor::~Acceptor() {
  stopping_ = true;
  thread_.join();
  close(listener_);
}

std::string Acceptor::address() const { return absl::StrCat("127.0.0.1:", port_); }

void Acceptor::Run() {
  while (!stopping_) {
    pollfd ready{listener_, POLLIN, 0};
    if (poll(&ready, 1, kPollMilliseconds) <= 0) continue;
    Socket client(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC));
    if (client.ok()) on_connection_(std::move(client));
  }
}

}  // namespace modelstate
