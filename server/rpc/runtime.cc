#include "server/rpc/runtime.h"

#include "common/base/status.h"

namespace modelstate {

absl::StatusOr<std::shared_ptr<ModuleInstance>> Runtime::FindModule(absl::string_view name) const {
  if (name.empty()) {
    return MakeError(Reason::kInvalidField,
                     "module is not set; name a module (ListModules shows them)",
                     {{"field", "module"}});
  }
  return registry->Find(name);
}

}  // namespace modelstate
