#ifndef MODELSTATE_BENCH_PEER_PROCESS_H_
#define MODELSTATE_BENCH_PEER_PROCESS_H_

#include <sys/types.h>

#include <cstdio>
#include <string>
#include <vector>

namespace modelstate {

// A program beside ours in a benchmark, such as bench/checkpoint_peers.py, that answers each line
// on its standard input with one line on its standard output. Ends with the object; where it ends
// before, the benchmark ends with an error. Thread-compatible.
class PeerProcess {
 public:
  // `command` is what a shell would run.
  explicit PeerProcess(const std::string& command);
  ~PeerProcess();
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;

  std::string Ask(const std::vector<std::string>& words);  // joined by tabs

 private:
  pid_t pid_ = -1;
  FILE* in_ = nullptr;
  FILE* out_ = nullptr;
};

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_PEER_PROCESS_H_
