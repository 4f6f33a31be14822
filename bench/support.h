#ifndef MODELSTATE_BENCH_SUPPORT_H_
#define MODELSTATE_BENCH_SUPPORT_H_

#include <malloc.h>
#include <signal.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

// What the benchmarks have in common.
namespace modelstate {

inline double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename T>
T OrDie(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
  std::exit(1);
}

inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// As the server and the command-line tool do, so that freed memory is not given back and faulted in
// again.
inline void TuneMalloc() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 2000000000);
  mallopt(M_TOP_PAD, 64 << 20);
  mallopt(M_ARENA_MAX, 1);
}

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

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_SUPPORT_H_
