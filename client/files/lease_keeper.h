#ifndef MODELSTATE_CLIENT_FILES_LEASE_KEEPER_H_
#define MODELSTATE_CLIENT_FILES_LEASE_KEEPER_H_

#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/client.h"

namespace modelstate::client {

// Renews the lease of a pin from a thread of its own, at every third of it, however long what is
// done with the pinned version takes. Thread-safe.
class LeaseKeeper {
 public:
  // The pin `snapshot_id` of `module` has a lease of `lease` by now.
  LeaseKeeper(const Client& client, std::string module, std::string snapshot_id,
              absl::Duration lease);
  // Ends a renewal under way and the thread; the pin stays.
  ~LeaseKeeper();
  LeaseKeeper(const LeaseKeeper&) = delete;
  LeaseKeeper& operator=(const LeaseKeeper&) = delete;

  // How the last renewal ended, that of RenewSnapshot; OK before the first.
  absl::Status status() const;

 private:
  void Run();

  const Client client_;
  const std::string module_;
  const std::string snapshot_id_;
  const absl::Duration lease_;
  Cancellation cancellation_;
  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;  // last: it uses the rest
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_LEASE_KEEPER_H_
