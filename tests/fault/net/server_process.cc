#include "tests/fault/net/server_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace modelstate {

absl::StatusOr<std::unique_ptr<ServerProcess>> ServerProcess::Start(
    const std::string& checkpoint_root) {
  std::vector<std::string> arguments = {MODELSTATE_SERVER_BINARY, "--listen=127.0.0.1:0",
                                        "--device=cpu", "--log_level=off",
                                        absl::StrCat("--checkpoint_root=", checkpoint_root)};
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe2");
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(ends[1], STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return absl::ErrnoToStatus(errno, "fork");
  }
  std::unique_ptr<ServerProcess> server(new ServerProcess(pid, ends[0]));
  std::string line;
  for (char c = 0; read(ends[0], &c, 1) == 1;) {
    if (c != '\n') {
      line.push_back(c);
    } else if (absl::StartsWith(line, "listening on ")) {
      if (absl::SimpleAtoi(line.substr(line.rfind(':') + 1), &server->port_)) return server;
      break;
    } else {
      line.clear();
    }
  }
  return absl::InternalError(absl::StrCat(MODELSTATE_SERVER_BINARY, " did not start: ", line));
}

void ServerProcess::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  close(output_);
  pid_ = 0;
}

}  // namespace modelstate
