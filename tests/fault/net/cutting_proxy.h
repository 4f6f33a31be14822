#ifndef MODELSTATE_TESTS_FAULT_NET_CUTTING_PROXY_H_
#define MODELSTATE_TESTS_FAULT_NET_CUTTING_PROXY_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "tests/fault/net/socket.h"

namespace modelstate {

// A TCP proxy that is a link of a certain rate: it counts what it brings to clients, and does
// something to the connection that brings a chosen byte. Thread-safe.
class CuttingProxy {
 public:
  enum class Cut {
    kNothing,     // `then` alone
    kServerSide,  // the server sees a reset, the client what had come and an end
    kBothSides,
  };

  // To a port of 127.0.0.1, with so many bytes a second towards all clients together.
  CuttingProxy(int target_port, double bytes_per_second);
  ~CuttingProxy();
  CuttingProxy(const CuttingProxy&) = delete;
  CuttingProxy& operator=(const CuttingProxy&) = delete;

  std::string address() const { return listener_->address(); }
  uint64_t bytes_to_clients() const { return bytes_to_clients_; }
  uint64_t connections() const { return connections_; }

  // Once, when `bytes` more have been brought to clients: `then`, called by the connection's thread
  // while the link stands still, and the cut.
  void CutAfter(uint64_t bytes, Cut cut, std::function<void()> then);
  // Closes every further connection at once.
  void Refuse() { refusing_ = true; }

 private:
  void Accept(Socket client);
  void Carry(Socket client, Socket server);
  // Until the link is free for `size` bytes more.
  void Pace(size_t size);
  void SetStill(bool still);
  // False: the connection is over.
  bool Bring(Socket& client, Socket& server, absl::string_view bytes);

  const int target_port_;
  const double bytes_per_second_;
  absl::Notification stopping_;
  std::atomic<bool> refusing_{false};
  std::atomic<uint64_t> bytes_to_clients_{0};
  std::atomic<uint64_t> connections_{0};
  absl::Mutex mutex_;
  bool still_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time free_at_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  uint64_t until_cut_ ABSL_GUARDED_BY(mutex_) = UINT64_MAX;
  Cut cut_ ABSL_GUARDED_BY(mutex_) = Cut::kNothing;
  std::function<void()> then_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> carriers_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<Acceptor> listener_;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAULT_NET_CUTTING_PROXY_H_
