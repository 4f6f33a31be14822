#include "server/rpc/module_factory.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/initial_values.h"
#include "server/state/registration.h"

namespace modelstate {
namespace {

// What torch refuses to register, before anything else is looked at.
absl::Status CheckNames(const v1::ModuleSpec& spec) {
  Registrar registrar;
  for (const v1::TensorInfo& info : spec.tensors()) {
    const bool buffer = info.kind() == v1::BUFFER;
    MS_RETURN_IF_ERROR(
        registrar.AddName(info.name(), buffer ? TensorKind::kBuffer : TensorKind::kParameter));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<ModuleInstance>> CreateModuleFromSpec(
    Runtime& runtime, const v1::CreateModuleRequest& request) {
  MS_RETURN_IF_ERROR(ModuleRegistry::ValidateName(request.name()));
  if (runtime.registry->Find(request.name()).ok()) {
    // Registering would find out too, but only after all the work.
    return MakeError(Reason::kModuleExists,
                     absl::StrCat("there is a module \"", request.name(),
                                  "\" already; delete it first, or choose another name"),
                     {{"module", request.name()}});
  }
  ModuleMetadata metadata(request.spec().metadata().begin(), request.spec().metadata().end());
  MS_RETURN_IF_ERROR(CheckMetadata(metadata));
  MS_RETURN_IF_ERROR(CheckNames(request.spec()));
  MS_ASSIGN_OR_RETURN(std::vector<TensorSpec> specs,
                      TensorSpecsFromProto(request.spec().tensors()));
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const ModuleSchema> schema,
                      ModuleSchema::Create(std::move(specs), 1));
  MS_ASSIGN_OR_RETURN(Device* const chosen, runtime.FindDevice(request.device()));
  Device& device = *chosen;
  const BufferPool::Usage usage = device.pool()->usage();
  if (schema->storage_bytes() > usage.limit_bytes - std::min(usage.limit_bytes, usage.used_bytes)) {
    return MakeError(
        Reason::kDeviceMemory,
        absl::StrCat("module \"", request.name(), "\" needs ", schema->storage_bytes(),
                     " bytes on ", device.name(), ", where ", usage.used_bytes, " of ",
                     usage.limit_bytes,
                     " are in use; delete a module, or raise the server's --device_memory_bytes"),
        {{"requested_bytes", absl::StrCat(schema->storage_bytes())},
         {"used_bytes", absl::StrCat(usage.used_bytes)},
         {"limit_bytes", absl::StrCat(usage.limit_bytes)}});
  }
  std::vector<InitialValue> values(schema->size());
  for (uint32_t i = 0; i < schema->size(); ++i) {
    const v1::TensorInfo& info = request.spec().tensors(static_cast<int>(i));
    const TensorSpec& spec = schema->spec(i);
    if (spec.is_alias()) {
      MS_RETURN_IF_ERROR(CheckTiedHasNoValue(spec, info.has_values() || info.has_initializer()));
      continue;
    }
    MS_ASSIGN_OR_RETURN(values[i], InitialValueFromProto(info, spec, request.spec().seed()));
  }
  std::vector<StorageRef> storages(schema->size());
  for (uint32_t i = 0; i < schema->size(); ++i) {
    const TensorSpec& spec = schema->spec(i);
    if (spec.is_alias()) {
      storages[i] = storages[schema->owner(i)];
      continue;
    }
    MS_ASSIGN_OR_RETURN(RefPtr<TensorStorage> storage,
                        TensorStorage::Allocate(device, spec.nbytes()));
    MS_RETURN_IF_ERROR(FillInitialValue(values[i], spec, *runtime.compute, *storage));
    storages[i] = std::move(storage);
  }
  return runtime.registry->Create(request.name(), std::move(schema), std::move(storages),
                                  std::move(metadata), &device);
}

absl::StatusOr<std::shared_ptr<ModuleInstance>> CreateEmptyModule(Runtime& runtime,
                                                                  const std::string& name) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const ModuleSchema> schema, ModuleSchema::Create({}, 1));
  return runtime.registry->Create(name, std::move(schema), {}, {});
}

}  // namespace modelstate
