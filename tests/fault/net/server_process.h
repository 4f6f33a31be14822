#ifndef MODELSTATE_TESTS_FAULT_NET_SERVER_PROCESS_H_
#define MODELSTATE_TESTS_FAULT_NET_SERVER_PROCESS_H_

#include <sys/types.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace modelstate {

// modelstate-server in a process of its own, on a free port. Ends with SIGKILL, also when this
// program dies. Start it from a thread that lives as long.
class ServerProcess {
 public:
  static absl::StatusOr<std::unique_ptr<ServerProcess>> Start(const std::string& checkpoint_root);
  ~ServerProcess() { Kill(); }
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  int port() const { return port_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  // kill -9, and waits until it is gone.
  void Kill();

 private:
  ServerProcess(pid_t pid, int output) : pid_(pid), output_(output) {}

  pid_t pid_;
  int output_;  // held open: what the server prints must not end it
  int port_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAULT_NET_SERVER_PROCESS_H_
