#include "server/module/module_registry.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/checkpoint_names.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr size_t kMaxNameBytes = 128;
constexpr ptrdiff_t kMaxNameParts = 16;

std::string Shown(absl::string_view name) {
  return absl::StrCat("\"", name.substr(0, kMaxNameBytes), name.size() > kMaxNameBytes ? "..." : "",
                      "\"");
}

}  // namespace

absl::Status ModuleRegistry::ValidateName(absl::string_view name) {
  bool good = !name.empty() && name.size() <= kMaxNameBytes && absl::ascii_isalnum(name.front());
  for (char c : name) {
    good = good && (absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-' || c == '/');
  }
  if (good) {
    // It is the directory of the module's periodic saves, and a restore looks no deeper.
    if (std::count(name.begin(), name.end(), '/') >= kMaxNameParts) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("module name ", Shown(name), " has more than ", kMaxNameParts,
                                    " parts between slashes: choose a shorter name"),
                       {{"field", "module"}});
    }
    for (const absl::string_view part : absl::StrSplit(name, '/')) {
      absl::string_view problem = PathPartProblem(part);
      if (part.empty() || part == "." || part == "..")
        problem = "has an empty, \".\" or \"..\" part";
      if (problem.empty()) continue;
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("module name ", Shown(name), " ", problem,
                                    ", and it is the path of its periodic saves: choose another"),
                       {{"field", "module"}});
    }
    return absl::OkStatus();
  }
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("module name ", Shown(name),
                                " must have 1 to 128 characters of A-Z a-z 0-9 . _ - / and begin "
                                "with a letter or digit: choose another name"),
                   {{"field", "module"}});
}

absl::StatusOr<std::shared_ptr<ModuleInstance>> ModuleRegistry::Create(
    std::string name, std::shared_ptr<const ModuleSchema> schema, std::vector<StorageRef> storages,
    ModuleMetadata metadata, Device* device) {
  MS_RETURN_IF_ERROR(ValidateName(name));
  const bool ready = !schema->empty();
  ModuleEnvironment environment = environment_;
  if (device != nullptr) environment.device = device;
  auto module = std::make_shared<ModuleInstance>(name, std::move(environment), std::move(schema),
                                                 std::move(storages), std::move(metadata));
  Hosted hosted{module, ready, nullptr};
  if (!ready) {
    const ModuleInstance* watched = module.get();
    hosted.subscription = module->Subscribe([this, watched] { AnnounceIfReady(*watched); });
  }
  absl::MutexLock lock(&mutex_);
  if (modules_.contains(name)) {
    return MakeError(
        Reason::kModuleExists,
        absl::StrCat("module ", Shown(name),
                     " exists already: delete it first, load into it, or choose another name"),
        {{"module", name}});
  }
  if (listener_) listener_(name, ready);
  modules_.emplace(std::move(name), std::move(hosted));
  return module;
}

void ModuleRegistry::AnnounceIfReady(const ModuleInstance& module) {
  if (module.state() != ModuleState::kReady) return;
  absl::MutexLock lock(&mutex_);
  const auto it = modules_.find(module.name());
  if (it == modules_.end() || it->second.module.get() != &module) return;
  if (std::exchange(it->second.announced_ready, true)) return;
  if (listener_) listener_(module.name(), true);
}

absl::StatusOr<std::shared_ptr<ModuleInstance>> ModuleRegistry::Find(absl::string_view name) const {
  absl::MutexLock lock(&mutex_);
  const auto it = modules_.find(name);
  if (it != modules_.end()) return it->second.module;
  std::vector<std::string> names;
  for (const auto& entry : modules_) names.push_back(entry.first);
  return MakeError(
      Reason::kModuleNotFound,
      names.empty()
          ? absl::StrCat("no module ", Shown(name),
                         ": the server hosts none yet; create one, or load a "
                         "checkpoint with create_module")
          : absl::StrCat("no module ", Shown(name), "; the server hosts: ", QuotedList(names)),
      {{"module", std::string(name)}});
}

std::vector<std::shared_ptr<ModuleInstance>> ModuleRegistry::List(absl::string_view after,
                                                                  size_t limit) const {
  absl::MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<ModuleInstance>> found;
  for (auto it = modules_.upper_bound(after); it != modules_.end() && found.size() < limit; ++it) {
    found.push_back(it->second.module);
  }
  return found;
}

void ModuleRegistry::ForEach(absl::FunctionRef<void(ModuleInstance&)> visit) const {
  absl::MutexLock lock(&mutex_);
  for (const auto& [name, hosted] : modules_) visit(*hosted.module);
}

size_t ModuleRegistry::size() const {
  absl::MutexLock lock(&mutex_);
  return modules_.size();
}

bool ModuleRegistry::Remove(const ModuleInstance& module) {
  Hosted hosted;  // ends outside of the lock
  absl::MutexLock lock(&mutex_);
  const auto it = modules_.find(module.name());
  if (it == modules_.end() || it->second.module.get() != &module) return false;
  hosted = std::move(it->second);
  modules_.erase(it);
  if (listener_) listener_(module.name(), false);
  return true;
}

absl::Status ModuleRegistry::Delete(absl::string_view name,
                                    absl::AnyInvocable<void(const ModuleInstance&)> done) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module, Find(name));
  if (!Remove(*module)) {
    return MakeError(Reason::kModuleNotFound,
                     absl::StrCat("module ", Shown(name), " was deleted by another call"),
                     {{"module", std::string(name)}});
  }
  module->Delete([module, done = std::move(done)]() mutable { done(*module); });
  return absl::OkStatus();
}

void ModuleRegistry::DeleteIfEmpty(const std::shared_ptr<ModuleInstance>& module,
                                   absl::AnyInvocable<void()> done) {
  module->DeleteIfEmpty([this, module] { Remove(*module); },
                        [done = std::move(done)](bool) mutable { done(); });
}

}  // namespace modelstate
