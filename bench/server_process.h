#ifndef MODELSTATE_BENCH_SERVER_PROCESS_H_
#define MODELSTATE_BENCH_SERVER_PROCESS_H_

#include <signal.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

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
  explicit ServerProcess(const std::string& binary, const std::string& device = "cpu",
                         const std::vector<std::string>& flags = {})
      : root_(TemporaryFolder()) {
    std::vector<std::string> command = {binary, "--listen=127.0.0.1:0",
                                        absl::StrCat("--checkpoint_root=", root_),
                                        absl::StrCat("--device=", device), "--log_level=warn"};
    command.insert(command.end(), flags.begin(), flags.end());
    Start(command);
  }
  // Any program that says "listening on HOST:PORT" on its standard output.
  explicit ServerProcess(const std::vector<std::string>& command) { Start(command); }
  ~ServerProcess() {
    kill(pid_, SIGTERM);
    waitpid(pid_, nullptr, 0);
    std::error_code ignored;
    if (!root_.empty()) std::filesystem::remove_all(root_, ignored);
  }
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;
  const std::string& root() const { return root_; }  // of its checkpoints
  const std::string& target() const { return target_; }
  pid_t pid() const { return pid_; }

 private:
  static std::string TemporaryFolder() {
    char name[] = "/tmp/modelstate-bench-XXXXXX";
    if (mkdtemp(name) == nullptr) std::exit(1);
    return name;
  }

  void Start(const std::vector<std::string>& command) {
    int out[2];
    if (pipe(out) != 0) std::exit(1);
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGTERM);  // also when the benchmark ends by an error
      dup2(out[1], STDOUT_FILENO);
      close(out[0]);
      execvp(arguments[0], arguments.data());
      std::perror(arguments[0]);
      std::_Exit(1);
    }
    close(out[1]);
    FILE* stream = fdopen(out[0], "r");
    char target[256] = "";
    if (std::fscanf(stream, "listening on %255s", target) != 1) {
      std::fprintf(stderr, "%s did not say where it listens\n", arguments[0]);
      std::exit(1);
    }
    target_ = target;
  }

  std::string root_;
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
