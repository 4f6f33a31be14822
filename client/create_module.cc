// CreateModule and its inverse. A spec that is too large for one message goes as a load.
#include <map>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "client/client.h"
#include "client/connection.h"
#include "client/from_proto.h"
#include "client/module_spec_proto.h"
#include "client/upload.h"
#include "common/base/status.h"
#include "common/wire/convert.h"

namespace modelstate::client {
namespace {

// What a server with default settings takes, less some room.
constexpr size_t kMaxSpecBytes = (size_t{4} << 20) - 4096;
constexpr int kSpecPageSize = 10000;

absl::StatusOr<ModuleInfo> CreateInOneCall(const Connection& connection,
                                           const v1::CreateModuleRequest& request,
                                           Cancellation* cancellation) {
  MS_ASSIGN_OR_RETURN(const v1::Module module,
                      connection.Call(&v1::ModelState::Stub::CreateModule, request,
                                      /*idempotent=*/false, cancellation));
  return FromProto(module);
}

// A load takes a tied name with the dtype and shape of its owner, which a spec may leave out.
absl::Status ResolveAliases(google::protobuf::RepeatedPtrField<v1::TensorInfo>* tensors) {
  absl::flat_hash_map<absl::string_view, const v1::TensorInfo*> owners;
  for (v1::TensorInfo& tensor : *tensors) {
    if (tensor.alias_of().empty()) {
      owners.emplace(tensor.name(), &tensor);
      continue;
    }
    const auto owner = owners.find(tensor.alias_of());
    if (owner == owners.end()) {
      return MakeError(Reason::kUnknownKey,
                       absl::StrCat("tensor \"", tensor.name(), "\": alias_of names \"",
                                    tensor.alias_of(), "\", which does not come before it"),
                       {{"tensor", tensor.name()}, {"alias_of", tensor.alias_of()}});
    }
    tensor.set_kind(owner->second->kind());
    tensor.set_dtype(owner->second->dtype());
    *tensor.mutable_shape() = owner->second->shape();
    if (owner->second->has_requires_grad()) {
      tensor.set_requires_grad(owner->second->requires_grad());
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ModuleInfo> FillByLoad(const Connection& connection, const std::string& module,
                                      v1::ModuleSpec* spec, Cancellation* cancellation) {
  MS_RETURN_IF_ERROR(ResolveAliases(spec->mutable_tensors()));
  for (v1::TensorInfo& tensor : *spec->mutable_tensors()) {
    const bool filled =
        tensor.has_values() || tensor.has_initializer() || !tensor.alias_of().empty();
    if (!filled) tensor.mutable_initializer()->set_zeros(true);
  }
  v1::LoadPart part;
  v1::LoadHeader& header = *part.mutable_header();
  header.set_module(module);
  header.set_tensor_count(static_cast<uint64_t>(spec->tensors_size()));
  header.set_seed(spec->seed());
  v1::LoadResult response;
  MS_RETURN_IF_ERROR(SendInlineTable(
      connection, "LoadStateDict", part, static_cast<size_t>(spec->tensors_size()),
      [spec](size_t i, v1::TensorInfo* info) {
        info->Swap(spec->mutable_tensors(static_cast<int>(i)));
      },
      &response, cancellation));
  return FromProto(response.module());
}

}  // namespace

absl::StatusOr<ModuleInfo> Client::CreateModule(const std::string& name, const ModuleSpec& spec,
                                                const std::string& device,
                                                Cancellation* cancellation) const {
  v1::CreateModuleRequest request;
  request.set_name(name);
  request.set_device(device);
  ToProto(spec, request.mutable_spec());
  if (request.ByteSizeLong() <= kMaxSpecBytes) {
    return CreateInOneCall(*connection_, request, cancellation);
  }

  v1::ModuleSpec tensors;
  tensors.mutable_tensors()->Swap(request.mutable_spec()->mutable_tensors());
  tensors.set_seed(spec.seed);
  MS_RETURN_IF_ERROR(CreateInOneCall(*connection_, request, cancellation).status());
  absl::StatusOr<ModuleInfo> module = FillByLoad(*connection_, name, &tensors, cancellation);
  if (!module.ok()) (void)DeleteModule(name);
  return module;
}

absl::StatusOr<ModuleInfo> Client::CreateModule(
    const std::string& name, absl::Span<const TensorSpec> tensors,
    const std::map<std::string, std::string>& metadata) const {
  ModuleSpec spec;
  spec.metadata = metadata;
  spec.tensors.reserve(tensors.size());
  for (const TensorSpec& tensor : tensors) {
    spec.tensors.emplace_back();
    spec.tensors.back().spec = tensor;
  }
  return CreateModule(name, spec);
}

absl::StatusOr<ModuleSpec> Client::GetModuleSpec(const std::string& module) const {
  v1::GetModuleSpecRequest request;
  request.set_module(module);
  request.set_page_size(kSpecPageSize);
  // Joined before it is converted: a tied name may be on a later page than its owner.
  v1::ModuleSpec spec;
  do {
    MS_ASSIGN_OR_RETURN(
        v1::GetModuleSpecResponse page,
        connection_->Call(&v1::ModelState::Stub::GetModuleSpec, request, /*idempotent=*/true));
    spec.MergeFrom(page.spec());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return FromProto(spec);
}

}  // namespace modelstate::client
