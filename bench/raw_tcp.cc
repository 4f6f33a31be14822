#include "bench/raw_tcp.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace modelstate {
namespace {

constexpr size_t kPiece = 1 << 20;
constexpr size_t kFilePiece = 256 << 10;
constexpr char kAskForBytes = 'f';
constexpr char kTakeBytes = 'p';

void Check(bool ok, const char* what) {
  if (ok) return;
  std::perror(what);
  std::_Exit(1);
}

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void SendAll(int fd, const uint8_t* data, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, data, size < kPiece ? size : kPiece, MSG_NOSIGNAL);
    Check(sent > 0, "send");
    data += sent;
    size -= static_cast<size_t>(sent);
  }
}

// False when the other side has closed the connection before the first byte.
bool ReceiveAll(int fd, uint8_t* data, size_t size) {
  bool first = true;
  while (size > 0) {
    const ssize_t got = recv(fd, data, size < kPiece ? size : kPiece, 0);
    if (got == 0 && first) return false;
    Check(got > 0, "recv");
    first = false;
    data += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

void Tune(int fd) {
  // Best effort: where it is not allowed, both sides of the comparison run with the host's default.
  setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

[[noreturn]] void Serve(int fd, size_t bytes, const std::function<void(const uint8_t*)>& received,
                        const uint8_t* content) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, size));
  Check(memory != nullptr, "aligned_alloc");
  madvise(memory, size, MADV_HUGEPAGE);  // as the server's; a wish
  std::memset(memory, 1, size);
  if (content != nullptr) std::memcpy(memory, content, bytes);
  uint8_t command = 0;
  while (ReceiveAll(fd, &command, 1)) {
    if (command == kAskForBytes) {
      SendAll(fd, memory, bytes);
    } else {
      ReceiveAll(fd, memory, bytes);
      if (received) received(memory);
      SendAll(fd, &command, 1);
    }
  }
  std::_Exit(0);
}

}  // namespace

RawTcp::RawTcp(size_t bytes, std::function<void(const uint8_t*)> received, const uint8_t* content)
    : bytes_(bytes) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  Check(listener >= 0, "socket");
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  Check(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0, "bind");
  Check(listen(listener, 1) == 0, "listen");
  socklen_t length = sizeof(address);
  Check(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0, "getsockname");
  child_ = fork();
  Check(child_ >= 0, "fork");
  if (child_ == 0) {
    const int fd = accept(listener, nullptr, nullptr);
    Check(fd >= 0, "accept");
    close(listener);
    Tune(fd);
    Serve(fd, bytes, received, content);
  }
  close(listener);
  socket_ = socket(AF_INET, SOCK_STREAM, 0);
  Check(socket_ >= 0, "socket");
  Tune(socket_);
  Check(connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0, "connect");
}

RawTcp::~RawTcp() {
  close(socket_);
  waitpid(child_, nullptr, 0);
}

double RawTcp::Fetch(uint8_t* destination) {
  const double begin = Now();
  const auto command = static_cast<uint8_t>(kAskForBytes);
  SendAll(socket_, &command, 1);
  Check(ReceiveAll(socket_, destination, bytes_), "the other process ended");
  return Now() - begin;
}

double RawTcp::FetchToFile(const std::string& path) {
  const double begin = Now();
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  Check(file >= 0, "open");
  const auto command = static_cast<uint8_t>(kAskForBytes);
  SendAll(socket_, &command, 1);
  std::vector<uint8_t> buffer(kFilePiece);
  for (size_t left = bytes_; left > 0;) {
    const ssize_t got = recv(socket_, buffer.data(), std::min(left, buffer.size()), 0);
    Check(got > 0, "recv");
    Check(write(file, buffer.data(), static_cast<size_t>(got)) == got, "write");
    left -= static_cast<size_t>(got);
  }
  Check(close(file) == 0, "close");
  return Now() - begin;
}

double RawTcp::Push(const uint8_t* source) {
  const double begin = Now();
  auto command = static_cast<uint8_t>(kTakeBytes);
  SendAll(socket_, &command, 1);
  SendAll(socket_, source, bytes_);
  Check(ReceiveAll(socket_, &command, 1), "the other process ended");
  return Now() - begin;
}

}  // namespace modelstate
