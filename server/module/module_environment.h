#ifndef MODELSTATE_SERVER_MODULE_MODULE_ENVIRONMENT_H_
#define MODELSTATE_SERVER_MODULE_MODULE_ENVIRONMENT_H_

#include <asio/thread_pool.hpp>
#include <functional>
#include <memory>

#include "absl/time/time.h"
#include "server/device/compute_pool.h"
#include "server/device/device.h"
#include "server/device/memory_budget.h"
#include "server/module/worker_table.h"

namespace modelstate {

// What modules run on. Outlives them.
struct ModuleEnvironment {
  Device* device = nullptr;  // where a module begins; ModuleInstance::device() is where it is now
  ComputePool* compute = nullptr;
  asio::thread_pool* strands = nullptr;
  std::shared_ptr<MemoryBudget> snapshot_budget;  // held versions
  std::shared_ptr<MemoryBudget> push_budget;      // arriving pushes and loads
  WorkerLimits workers;
  std::function<absl::Time()> clock;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_MODULE_ENVIRONMENT_H_
