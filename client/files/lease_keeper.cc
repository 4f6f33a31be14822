#include "client/files/lease_keeper.h"

#include <utility>

namespace modelstate::client {

LeaseKeeper::LeaseKeeper(const Client& client, std::string module, std::string snapshot_id,
                         absl::Duration lease)
    : client_(client),
      module_(std::move(module)),
      snapshot_id_(std::move(snapshot_id)),
      lease_(lease),
      thread_([this] { Run(); }) {}

LeaseKeeper::~LeaseKeeper() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  cancellation_.Cancel();
  thread_.join();
}

absl::Status LeaseKeeper::status() const {
  absl::MutexLock lock(&mutex_);
  return status_;
}

void LeaseKeeper::Run() {
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), lease_ / 3)) return;
    }
    // A failure is tried again a third later: the lease may outlast it.
    absl::Status status =
        client_.RenewSnapshot(module_, snapshot_id_, lease_, &cancellation_).status();
    absl::MutexLock lock(&mutex_);
    if (stopping_) return;
    status_ = std::move(status);
  }
}

}  // namespace modelstate::client
