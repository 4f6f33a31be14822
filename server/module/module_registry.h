#ifndef MODELSTATE_SERVER_MODULE_MODULE_REGISTRY_H_
#define MODELSTATE_SERVER_MODULE_MODULE_REGISTRY_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/module/module_instance.h"

namespace modelstate {

// The modules of a server, by name. Thread-safe.
class ModuleRegistry {
 public:
  explicit ModuleRegistry(ModuleEnvironment environment) : environment_(std::move(environment)) {}

  // 1 to 128 characters of A-Z a-z 0-9 . _ - / beginning with a letter or digit, at most 16 parts
  // that a checkpoint's path can have: not empty, `.`, `..`, `latest` or a checkpoint's file, as
  // manifest.json. Else INVALID_FIELD.
  static absl::Status ValidateName(absl::string_view name);

  // `device` is where the storages are, or, of a module without, where a load puts them; null: the
  // environment's. ALREADY_EXISTS MODULE_EXISTS; INVALID_ARGUMENT INVALID_FIELD (the name).
  absl::StatusOr<std::shared_ptr<ModuleInstance>> Create(std::string name,
                                                         std::shared_ptr<const ModuleSchema> schema,
                                                         std::vector<StorageRef> storages,
                                                         ModuleMetadata metadata,
                                                         Device* device = nullptr);

  // NOT_FOUND MODULE_NOT_FOUND; the text lists names that exist.
  absl::StatusOr<std::shared_ptr<ModuleInstance>> Find(absl::string_view name) const;

  // By name, after `after`; at most `limit`.
  std::vector<std::shared_ptr<ModuleInstance>> List(absl::string_view after, size_t limit) const;
  size_t size() const;
  void ForEach(absl::FunctionRef<void(ModuleInstance&)> visit) const;  // must not call the registry

  // Takes the name away at once; `done` is called with the module when that is deleted.
  absl::Status Delete(absl::string_view name,
                      absl::AnyInvocable<void(const ModuleInstance& module)> done);
  // Deletes this module, and no other that has its name now, if it is empty still: a load that has
  // committed by then keeps it. `done` is called either way. Nobody holds a version of it.
  void DeleteIfEmpty(const std::shared_ptr<ModuleInstance>& module,
                     absl::AnyInvocable<void()> done);

  // Called when a module is created (whether it is ready: an empty one is not), becomes ready by a
  // load (true) or is deleted (false), in that order for every life of a name. Set before the first
  // module; must not block nor call the registry, whose lock is held.
  using Listener = std::function<void(const std::string& module, bool ready)>;
  void SetListener(Listener listener) { listener_ = std::move(listener); }

  const ModuleEnvironment& environment() const { return environment_; }

 private:
  struct Hosted {
    std::shared_ptr<ModuleInstance> module;
    bool announced_ready = false;
    // Of a module that was created empty; ends outside of mutex_, which its call takes.
    std::unique_ptr<ModuleInstance::Subscription> subscription;
  };

  void AnnounceIfReady(const ModuleInstance& module);
  // Takes the name away from this module; false when it has none any more.
  bool Remove(const ModuleInstance& module);

  const ModuleEnvironment environment_;
  Listener listener_;
  mutable absl::Mutex mutex_;
  std::map<std::string, Hosted, std::less<>> modules_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_MODULE_REGISTRY_H_
