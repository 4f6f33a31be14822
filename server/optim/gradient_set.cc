#include "server/optim/gradient_set.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

absl::Status CheckKind(const PushedTensor& tensor, const TensorSpec& spec) {
  const ErrorMetadata metadata = {{"tensor", tensor.name}};
  if (tensor.kind == TensorKind::kBuffer) {
    if (spec.kind == TensorKind::kBuffer) return absl::OkStatus();
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("\"", tensor.name,
                                  "\" is a parameter: push its gradient with kind GRADIENT, or "
                                  "write its value with LoadStateDict"),
                     metadata);
  }
  if (tensor.kind != TensorKind::kGradient) {
    return MakeError(
        Reason::kInvalidField,
        absl::StrCat("\"", tensor.name, "\" is pushed as ", TensorKindName(tensor.kind),
                     "; a push holds gradients and buffer values only"),
        metadata);
  }
  if (spec.kind != TensorKind::kParameter) {
    return MakeError(Reason::kNotAParameter,
                     absl::StrCat("\"", tensor.name,
                                  "\" is a buffer: an optimizer step updates parameters only; push "
                                  "its value with kind BUFFER to assign it, or leave it out"),
                     metadata);
  }
  if (!spec.requires_grad) {
    return MakeError(Reason::kParameterFrozen,
                     absl::StrCat("parameter \"", tensor.name,
                                  "\" is frozen (requires_grad is false); leave its gradient out, "
                                  "or unfreeze it with SetRequiresGrad"),
                     metadata);
  }
  if (!IsFloatingPoint(spec.dtype)) {
    return MakeError(Reason::kDTypeMismatch,
                     absl::StrCat("parameter \"", tensor.name, "\" is ", DTypeName(spec.dtype),
                                  ": the optimizers update real floating-point parameters only; "
                                  "leave its gradient out"),
                     metadata);
  }
  return absl::OkStatus();
}

// The owner's index for each tensor of the table.
absl::StatusOr<std::vector<uint32_t>> Match(const ModuleSchema& schema,
                                            absl::Span<const PushedTensor> tensors) {
  if (schema.empty()) {
    return MakeError(Reason::kModuleEmpty,
                     "the module has no tensors yet; load a checkpoint or a state_dict first");
  }
  std::vector<uint32_t> owners;
  owners.reserve(tensors.size());
  std::vector<bool> given(schema.size(), false);
  for (const PushedTensor& tensor : tensors) {
    const ErrorMetadata metadata = {{"tensor", tensor.name}};
    const std::optional<uint32_t> index = schema.Find(tensor.name);
    if (!index) {
      return MakeError(Reason::kUnknownKey,
                       absl::StrCat("the module has no tensor named \"", tensor.name,
                                    "\"; list its parameters to see the names"),
                       metadata);
    }
    const TensorSpec& spec = schema.spec(*index);
    MS_RETURN_IF_ERROR(CheckKind(tensor, spec));
    if (tensor.shape != spec.shape) {
      return MakeError(
          Reason::kShapeMismatch,
          absl::StrCat(TensorKindName(tensor.kind), " of \"", tensor.name, "\" has shape ",
                       tensor.shape.ToString(), "; the ", TensorKindName(spec.kind), " has ",
                       spec.shape.ToString(), "; shapes must be equal, nothing is broadcast"),
          {{"tensor", tensor.name},
           {"shape", tensor.shape.ToString()},
           {"expected_shape", spec.shape.ToString()}});
    }
    if (tensor.dtype != spec.dtype) {
      return MakeError(Reason::kDTypeMismatch,
                       absl::StrCat(TensorKindName(tensor.kind), " of \"", tensor.name, "\" is ",
                                    DTypeName(tensor.dtype), "; the ", TensorKindName(spec.kind),
                                    " is ", DTypeName(spec.dtype), "; cast it before the push"),
                       {{"tensor", tensor.name},
                        {"dtype", std::string(DTypeName(tensor.dtype))},
                        {"expected_dtype", std::string(DTypeName(spec.dtype))}});
    }
    const uint32_t owner = schema.owner(*index);
    if (given[owner]) {
      return MakeError(
          Reason::kChunkInvalid,
          absl::StrCat("tensor \"", tensor.name, "\" comes twice in this push",
                       schema.spec(owner).name != tensor.name || schema.owner(*index) != *index
                           ? absl::StrCat(" (it is tied to \"", schema.spec(owner).name, "\")")
                           : "",
                       "; send each tensor once"),
          metadata);
    }
    given[owner] = true;
    owners.push_back(owner);
  }
  return owners;
}

}  // namespace

absl::StatusOr<GradientSet> StageGradients(std::shared_ptr<const ModuleSchema> schema,
                                           std::vector<PushedTensor> tensors, Device& device,
                                           MemoryBudget& push_budget) {
  MS_ASSIGN_OR_RETURN(const std::vector<uint32_t> owners, Match(*schema, tensors));
  // Cannot overflow: each owner comes once, and the schema has checked the sum of them all.
  uint64_t bytes = 0;
  for (uint32_t owner : owners) bytes += schema->spec(owner).nbytes();
  GradientSet gradients;
  MS_ASSIGN_OR_RETURN(gradients.reservation, push_budget.Reserve(bytes));
  gradients.entries.reserve(owners.size());
  for (uint32_t owner : owners) {
    MS_ASSIGN_OR_RETURN(RefPtr<TensorStorage> storage,
                        TensorStorage::Allocate(device, schema->spec(owner).nbytes()));
    gradients.entries.push_back({owner, std::move(storage)});
  }
  gradients.schema = std::move(schema);
  gradients.tensors = std::move(tensors);
  return gradients;
}

absl::Status RematchGradients(std::shared_ptr<const ModuleSchema> schema, GradientSet& gradients) {
  if (gradients.schema == schema) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const std::vector<uint32_t> owners, Match(*schema, gradients.tensors));
  for (size_t i = 0; i < owners.size(); ++i) gradients.entries[i].index = owners[i];
  gradients.schema = std::move(schema);
  return absl::OkStatus();
}

}  // namespace modelstate
