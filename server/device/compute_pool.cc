#include "server/device/compute_pool.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace modelstate {
namespace {

// One ParallelFor; lives on its caller's stack.
struct Job {
  Job(size_t count, absl::FunctionRef<void(size_t)> task) : count(count), task(task) {}

  void Run() {
    for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      task(i);
    }
  }
  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }

  const size_t count;
  const absl::FunctionRef<void(size_t)> task;
  std::atomic<size_t> next{0};
  size_t helpers = 0;  // threads inside Run besides the caller; guarded by Impl::mutex
};

}  // namespace

struct ComputePool::Impl {
  absl::Mutex mutex;
  absl::CondVar work;  // a job was added, or stop
  absl::CondVar left;  // a helper left a job
  std::vector<Job*> jobs ABSL_GUARDED_BY(mutex);
  bool stop ABSL_GUARDED_BY(mutex) = false;
  std::vector<std::thread> threads;

  Job* FindJob() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    for (Job* job : jobs) {
      if (!job->exhausted()) return job;
    }
    return nullptr;
  }

  void Loop() {
    absl::MutexLock lock(&mutex);
    while (!stop) {
      Job* job = FindJob();
      if (job == nullptr) {
        work.Wait(&mutex);
        continue;
      }
      ++job->helpers;
      mutex.Unlock();
      job->Run();
      mutex.Lock();
      if (--job->helpers == 0) left.SignalAll();
    }
  }
};

ComputePool::ComputePool(size_t threads)
    : threads_(threads != 0 ? threads : std::max(1u, std::thread::hardware_concurrency())),
      impl_(std::make_unique<Impl>()) {
  for (size_t i = 1; i < threads_; ++i) {
    impl_->threads.emplace_back([impl = impl_.get()] { impl->Loop(); });
  }
}

ComputePool::~ComputePool() {
  {
    absl::MutexLock lock(&impl_->mutex);
    impl_->stop = true;
    impl_->work.SignalAll();
  }
  for (std::thread& thread : impl_->threads) thread.join();
}

void ComputePool::ParallelFor(size_t count, absl::FunctionRef<void(size_t)> task) {
  if (count <= 1 || threads_ == 1) {
    for (size_t i = 0; i < count; ++i) task(i);
    return;
  }
  Job job(count, task);
  {
    absl::MutexLock lock(&impl_->mutex);
    impl_->jobs.push_back(&job);
    impl_->work.SignalAll();
  }
  job.Run();
  absl::MutexLock lock(&impl_->mutex);
  // Out of the list first, so that no helper joins while this waits for those that are inside.
  impl_->jobs.erase(std::find(impl_->jobs.begin(), impl_->jobs.end(), &job));
  while (job.helpers > 0) impl_->left.Wait(&impl_->mutex);
}

}  // namespace modelstate
