#include "bench/peer_process.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace modelstate {

PeerProcess::PeerProcess(const std::string& command) {
  int in[2];
  int out[2];
  if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) std::exit(1);
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    dup2(in[0], STDIN_FILENO);
    dup2(out[1], STDOUT_FILENO);
    // `exec`, so that the signal above reaches the program.
    execl("/bin/sh", "sh", "-c", absl::StrCat("exec ", command).c_str(), nullptr);
    std::_Exit(1);
  }
  close(in[0]);
  close(out[1]);
  in_ = fdopen(in[1], "w");
  out_ = fdopen(out[0], "r");
}

PeerProcess::~PeerProcess() {
  std::fclose(in_);
  std::fclose(out_);
  waitpid(pid_, nullptr, 0);
}

std::string PeerProcess::Ask(const std::vector<std::string>& words) {
  const std::string line = absl::StrCat(absl::StrJoin(words, "\t"), "\n");
  char answer[4096] = "";
  if (std::fputs(line.c_str(), in_) < 0 || std::fflush(in_) != 0 ||
      std::fgets(answer, sizeof(answer), out_) == nullptr) {
    std::fprintf(stderr, "no answer to: %s", line.c_str());
    std::exit(1);
  }
  std::string text = answer;
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

}  // namespace modelstate
