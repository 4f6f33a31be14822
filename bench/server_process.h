#ifndef MODELSTATE_BENCH_SERVER_PROCESS_H_
#define MODELSTATE_BENCH_SERVER_PROCESS_H_

#include <signal.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "bench/support.h"
#include "client/client.h"

// A server of its own for a benchmark.
namespace modelstate {

// The path of modelstate-server: `given`, or beside the program `self`.
inline std::string ServerBinary(const std::string& given, const std::string& self) {
  if (!given.empty()) return given;
  return absl::StrCat(self.substr(0, self.rfind('/') + 1), "modelstate-server");
}

// A server on a free loopback port with an empty checkpoint root; ends with the object.
class ServerProcess {
 public:
  explicit ServerProcess(const std::string& binary) {
    std::strcpy(root_, "/tmp/modelstate-bench-XXXXXX");
    int out[2];
    if (mkdtemp(root_) == nullptr || pipe(out) != 0) std::exit(1);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(out[1], STDOUT_FILENO);
      close(out[0]);
      const std::string root = absl::StrCat("--checkpoint_root=", root_);
      execl(binary.c_str(), binary.c_str(), "--listen=127.0.0.1:0", root.c_str(), "--device=cpu",
            "--log_level=warn", nullptr);
      std::perror(binary.c_str());
      std::_Exit(1);
    }
    close(out[1]);
    FILE* stream = fdopen(out[0], "r");
    char target[256] = "";
    if (std::fscanf(stream, "listening on %255s", target) != 1) {
      std::fprintf(stderr, "%s did not say where it listens\n", binary.c_str());
      std::exit(1);
    }
    target_ = target;
  }
  ~ServerProcess() {
    kill(pid_, SIGTERM);
    waitpid(pid_, nullptr, 0);
    rmdir(root_);
  }
  const std::string& target() const { return target_; }
  pid_t pid() const { return pid_; }

 private:
  char root_[64];
  pid_t pid_ = -1;
  std::string target_;
};

// With sockets as the command-line tool sets them up.
inline Client ConnectNear(const std::string& target) {
  ClientOptions options;
  options.transport_profile = TransportProfile::kAuto;
  return OrDie(Client::Connect(target, options));
}

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_SERVER_PROCESS_H_
