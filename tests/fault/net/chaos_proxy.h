#ifndef MODELSTATE_TESTS_FAULT_NET_CHAOS_PROXY_H_
#define MODELSTATE_TESTS_FAULT_NET_CHAOS_PROXY_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "tests/fault/net/socket.h"

namespace modelstate {

// A TCP proxy that is a bad network. On TCP bytes are never dropped nor doubled within a
// connection; what a caller sees as a dropped or doubled message is a connection that breaks at a
// bad moment and the call that is made again.
//
// Each connection carries a number of bytes towards the server that its own generator draws, then
// has one of the faults:
enum class Fault {
  kCut,         // reset both ways, in the middle of whatever is on the way
  kAnswerLost,  // requests still get through, answers no more; then reset
  kLateCopy,    // reset towards the client; what it had sent reaches the server later
  kSilence,     // nothing gets through in either direction for a while; then goes on
};
inline constexpr size_t kFaultKinds = 4;

// Every connection also has random delays. Thread-safe.
class ChaosProxy {
 public:
  // `listeners` ports, so that each client has a connection of its own: gRPC shares one among
  // channels to the same address. A connection has a fault every `mean_bytes` on average.
  ChaosProxy(uint64_t seed, int listeners, uint64_t mean_bytes);
  ~ChaosProxy();
  ChaosProxy(const ChaosProxy&) = delete;
  ChaosProxy& operator=(const ChaosProxy&) = delete;

  std::string address(int listener) const {
    return listeners_[static_cast<size_t>(listener)]->address();
  }
  // Where new connections lead: a port of 127.0.0.1. Until it is set they are closed at once.
  void SetTarget(int port) { target_ = port; }
  uint64_t faults(Fault kind) const { return faults_[static_cast<size_t>(kind)]; }
  uint64_t connections() const { return connections_; }

 private:
  class Connection;

  void Accept(size_t listener, Socket client);

  const uint64_t seed_;
  const uint64_t mean_bytes_;
  std::atomic<int> target_{0};
  absl::Notification stopping_;
  std::atomic<uint64_t> connections_{0};
  std::array<std::atomic<uint64_t>, kFaultKinds> faults_{};
  std::vector<uint64_t> accepted_;  // per listener, by its thread
  absl::Mutex mutex_;
  std::vector<std::thread> running_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Acceptor>> listeners_;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAULT_NET_CHAOS_PROXY_H_
