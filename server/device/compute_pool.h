#ifndef MODELSTATE_SERVER_DEVICE_COMPUTE_POOL_H_
#define MODELSTATE_SERVER_DEVICE_COMPUTE_POOL_H_

#include <cstddef>
#include <memory>

#include "absl/functional/function_ref.h"

namespace modelstate {

// Threads that compute together with the caller. Thread-safe: several callers may run at once and
// share the threads.
class ComputePool {
 public:
  // `threads` counts the caller: 1 runs everything in it; 0 is one per hardware thread.
  explicit ComputePool(size_t threads);
  ~ComputePool();

  // Calls `task(i)` once for each i in [0, count), from any thread and in any order, and returns
  // when all are done. The caller takes part, so it makes progress also when the threads are busy.
  // `task` must not throw.
  void ParallelFor(size_t count, absl::FunctionRef<void(size_t)> task);

  size_t threads() const { return threads_; }

 private:
  struct Impl;
  const size_t threads_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_DEVICE_COMPUTE_POOL_H_
