#ifndef MODELSTATE_SERVER_RPC_MODULE_FACTORY_H_
#define MODELSTATE_SERVER_RPC_MODULE_FACTORY_H_

#include <memory>

#include "absl/status/statusor.h"
#include "modelstate/v1/module.pb.h"
#include "server/rpc/runtime.h"

namespace modelstate {

// CreateModule: checks the whole spec, then allocates and fills the storages and registers the
// module. Touches as much memory as the module has: runs on an I/O thread.
absl::StatusOr<std::shared_ptr<ModuleInstance>> CreateModuleFromSpec(
    Runtime& runtime, const v1::CreateModuleRequest& request);

// An empty module for a load to fill.
absl::StatusOr<std::shared_ptr<ModuleInstance>> CreateEmptyModule(Runtime& runtime,
                                                                  const std::string& name);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_MODULE_FACTORY_H_
