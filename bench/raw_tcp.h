#ifndef MODELSTATE_BENCH_RAW_TCP_H_
#define MODELSTATE_BENCH_RAW_TCP_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace modelstate {

// The baseline of the transfer benchmark: another process and one TCP connection over loopback,
// with write() on one side and recv() straight into the destination on the other. Congestion
// control is reno where the host lets an unprivileged process choose it, since pacing hurts
// loopback. Aborts with a message when a system call fails. Thread-compatible.
class RawTcp {
 public:
  // Forks the other process, which holds `bytes` of touched memory. Call before starting threads.
  // `received` is called there, on a push, before the word that it has all.
  // `content`: what Fetch sends, `bytes` long; else some bytes.
  explicit RawTcp(size_t bytes, std::function<void(const uint8_t*)> received = nullptr,
                  const uint8_t* content = nullptr);
  ~RawTcp();
  RawTcp(const RawTcp&) = delete;
  RawTcp& operator=(const RawTcp&) = delete;

  // Seconds from asking for the bytes to having all of them in `destination` (`bytes` long).
  double Fetch(uint8_t* destination);
  // The same into a new file, through a buffer that stays in the cache.
  double FetchToFile(const std::string& path);
  // Seconds from the first write to the other side's word that it has all (and is done with it).
  double Push(const uint8_t* source);

 private:
  const size_t bytes_;
  int socket_ = -1;
  pid_t child_ = -1;
};

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_RAW_TCP_H_
