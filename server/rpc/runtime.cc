#include "server/rpc/runtime.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {

void Runtime::ApplyRetention(CheckpointInfo saved) {
  PostIo([this, saved = std::move(saved)] {
    std::vector<std::string> deleted;
    const absl::Status status = checkpoints->ApplyRetention(saved, retention, &deleted);
    for (const std::string& path : deleted) {
      log(absl::LogSeverity::kInfo,
          absl::StrCat("checkpoint \"", path, "\" is deleted: \"", saved.path,
                       "\" is saved, and --keep_last is ", retention.keep_last));
    }
    if (status.ok()) return;
    log(absl::LogSeverity::kError, absl::StrCat("old checkpoints beside \"", saved.path,
                                                "\" are not deleted: ", status.message()));
  });
}

absl::StatusOr<Device*> Runtime::FindDevice(absl::string_view name) const {
  if (name.empty()) return devices.front().get();
  std::vector<std::string> names;
  for (const std::unique_ptr<Device>& device : devices) {
    if (device->name() == name) return device.get();
    names.push_back(device->name());
  }
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("this server has no device \"", name.substr(0, 64), "\"; it has ",
                                QuotedList(names), " (the server's --device says which)"),
                   {{"field", "device"}});
}

absl::StatusOr<std::shared_ptr<ModuleInstance>> Runtime::FindModule(absl::string_view name) const {
  if (name.empty()) {
    return MakeError(Reason::kInvalidField,
                     "module is not set; name a module (ListModules shows them)",
                     {{"field", "module"}});
  }
  return registry->Find(name);
}

}  // namespace modelstate
