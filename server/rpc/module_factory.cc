#include "server/rpc/module_factory.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/values_codec.h"

namespace modelstate {
namespace {

constexpr size_t kFillBlock = size_t{64} << 10;

std::string What(const TensorSpec& spec) { return absl::StrCat("tensor \"", spec.name, "\""); }

// What `info` asks for: all elements, or one that is repeated, or nothing for zeros.
absl::StatusOr<std::string> InitialElements(const v1::TensorInfo& info, const TensorSpec& spec) {
  std::string bytes;
  if (info.has_values()) {
    if (info.has_initializer()) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat(What(spec), " has both values and an initializer; give one"),
                       {{"tensor", spec.name}});
    }
    absl::Status status =
        EncodeValues(info.values(), spec.dtype, spec.shape.num_elements(), &bytes);
    if (!status.ok()) return Annotate(status, What(spec));
    return bytes;
  }
  double constant = 0;
  switch (info.initializer().init_case()) {
    case v1::Initializer::kOnes:
      constant = 1;
      break;
    case v1::Initializer::kConstant:
      constant = info.initializer().constant();
      break;
    default:
      return bytes;
  }
  v1::Values value;
  value.mutable_doubles()->add_values(constant);
  if (spec.dtype == DType::kC64) value.mutable_doubles()->add_values(0);
  absl::Status status = EncodeValues(value, spec.dtype, 1, &bytes);
  if (!status.ok()) return Annotate(status, absl::StrCat(What(spec), ", initializer"));
  return bytes;
}

// Writes `elements` to the whole storage, again and again where they are fewer.
absl::Status Fill(absl::string_view elements, TensorStorage& storage) {
  Device& device = storage.device();
  if (elements.empty()) return device.FillZero(storage.MutableBuffer());
  std::string block(elements);
  while (block.size() < kFillBlock && block.size() < storage.size()) block += block;
  for (uint64_t offset = 0; offset < storage.size(); offset += block.size()) {
    const uint64_t size = std::min<uint64_t>(block.size(), storage.size() - offset);
    const auto* data = reinterpret_cast<const uint8_t*>(block.data());
    MS_RETURN_IF_ERROR(
        device.CopyFromHost(absl::MakeConstSpan(data, size), storage.MutableBuffer(), offset));
  }
  return absl::OkStatus();
}

absl::Status CheckAliasCarriesNothing(const v1::TensorInfo& info, const TensorSpec& spec) {
  if (!info.has_values() && !info.has_initializer()) return absl::OkStatus();
  return MakeError(Reason::kInvalidField,
                   absl::StrCat(What(spec), " is tied to \"", spec.alias_of,
                                "\", whose values it has; leave out its own"),
                   {{"tensor", spec.name}});
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
  std::vector<StorageRef> storages(schema->size());
  for (uint32_t i = 0; i < schema->size(); ++i) {
    const v1::TensorInfo& info = request.spec().tensors(static_cast<int>(i));
    const TensorSpec& spec = schema->spec(i);
    if (spec.is_alias()) {
      MS_RETURN_IF_ERROR(CheckAliasCarriesNothing(info, spec));
      storages[i] = storages[schema->owner(i)];
      continue;
    }
    MS_ASSIGN_OR_RETURN(const std::string bytes, InitialElements(info, spec));
    MS_ASSIGN_OR_RETURN(RefPtr<TensorStorage> storage,
                        TensorStorage::Allocate(device, spec.nbytes()));
    MS_RETURN_IF_ERROR(Fill(bytes, *storage));
    storages[i] = std::move(storage);
  }
  ModuleMetadata metadata(request.spec().metadata().begin(), request.spec().metadata().end());
  return runtime.registry->Create(request.name(), std::move(schema), std::move(storages),
                                  std::move(metadata), &device);
}

absl::StatusOr<std::shared_ptr<ModuleInstance>> CreateEmptyModule(Runtime& runtime,
                                                                  const std::string& name) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<const ModuleSchema> schema, ModuleSchema::Create({}, 1));
  return runtime.registry->Create(name, std::move(schema), {}, {});
}

}  // namespace modelstate
