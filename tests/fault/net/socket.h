#ifndef MODELSTATE_TESTS_FAULT_NET_SOCKET_H_
#define MODELSTATE_TESTS_FAULT_NET_SOCKET_H_

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/string_view.h"

namespace modelstate {

// A TCP connection of 127.0.0.1. Closes with a reset, as one that is cut, unless Close was called.
class Socket {
 public:
  explicit Socket(int fd);  // takes it over; below 0: none
  // ok() says whether somebody listens.
  static Socket Connect(int port);
  Socket(Socket&& other) noexcept;
  ~Socket() { Reset(); }

  bool ok() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  bool Send(absl::string_view bytes);
  // Valid until the next call. Empty: the peer has ended.
  absl::string_view Receive(int flags = 0);
  void Reset();
  // What was sent still arrives, then the end.
  void Close();

 private:
  int fd_;
  std::vector<char> buffer_;
};

// A port of 127.0.0.1 and the thread that accepts its connections.
class Acceptor {
 public:
  explicit Acceptor(std::function<void(Socket client)> on_connection);
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  std::string address() const;

 private:
  void Run();

  const std::function<void(Socket)> on_connection_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  std::thread thread_;  // last: it uses the rest
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAULT_NET_SOCKET_H_
