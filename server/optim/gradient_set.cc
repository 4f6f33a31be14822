#include "server/optim/gradient_set.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

absl::Status CheckKind(const PushedTensor& tensor, const TensorSpec& spec, bool ignore_frozen) {
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
    if (ignore_frozen) return absl::OkStatus();
    return MakeError(Reason::kParameterFrozen,
                     absl::StrCat("parameter \"", tensor.name,
                                  "\" is frozen (requires_grad is false); leave its gradient out, "
                                  "set ignore_frozen, or unfreeze it with SetRequiresGrad"),
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

bool IsAcceptedDType(const PushedTensor& tensor, const TensorSpec& spec) {
  if (tensor.dtype == spec.dtype) return true;
  return spec.kind == TensorKind::kParameter &&
         (tensor.dtype == DType::kF32 || tensor.dtype == DType::kBF16 ||
          tensor.dtype == DType::kF16);
}

uint64_t GradientBytes(const PushedTensor& tensor) {
  return static_cast<uint64_t>(tensor.shape.num_elements()) * DTypeSize(tensor.dtype);
}

// What a tensor of a push takes beside its own bytes: a place for the new parameter.
uint64_t OutputBytes(const PushedTensor& tensor, const TensorSpec& spec) {
  return GradientBytes(tensor) == spec.nbytes() ? 0 : spec.nbytes();
}

// For each tensor of the table where it goes: the owner's index, or nothing to be ignored.
using Targets = std::vector<std::optional<uint32_t>>;
absl::StatusOr<Targets> Match(const ModuleSchema& schema, absl::Span<const PushedTensor> tensors,
                              bool ignore_frozen) {
  if (schema.empty()) {
    return MakeError(Reason::kModuleEmpty,
                     "the module has no tensors yet; load a checkpoint or a state_dict first");
  }
  Targets targets;
  targets.reserve(tensors.size());
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
    MS_RETURN_IF_ERROR(CheckKind(tensor, spec, ignore_frozen));
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
    if (!IsAcceptedDType(tensor, spec)) {
      return MakeError(
          Reason::kDTypeMismatch,
          absl::StrCat(TensorKindName(tensor.kind), " of \"", tensor.name, "\" is ",
                       DTypeName(tensor.dtype), "; the ", TensorKindName(spec.kind), " is ",
                       DTypeName(spec.dtype),
                       spec.kind == TensorKind::kParameter
                           ? ": send the gradient in that dtype, or in F32, BF16 or F16"
                           : "; cast it before the push"),
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
    const bool ignored = tensor.kind == TensorKind::kGradient && !spec.requires_grad;
    targets.push_back(ignored ? std::nullopt : std::optional<uint32_t>(owner));
  }
  return targets;
}

}  // namespace

absl::StatusOr<GradientSet> StageGradients(std::shared_ptr<const ModuleSchema> schema,
                                           std::vector<PushedTensor> tensors, Device& device,
                                           MemoryBudget& push_budget, bool ignore_frozen,
                                           bool outputs) {
  MS_ASSIGN_OR_RETURN(const Targets targets, Match(*schema, tensors, ignore_frozen));
  // Cannot overflow: each owner comes once, the schema has checked the sum of them all, and a
  // gradient is at most four times as wide.
  uint64_t bytes = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (!targets[i]) continue;
    bytes += GradientBytes(tensors[i]);
    if (outputs) bytes += OutputBytes(tensors[i], schema->spec(*targets[i]));
  }
  GradientSet gradients;
  gradients.device = &device;
  gradients.ignore_frozen = ignore_frozen;
  MS_ASSIGN_OR_RETURN(gradients.reservation, push_budget.Reserve(bytes));
  gradients.entries.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    if (!targets[i]) {
      ++gradients.ignored;
      continue;
    }
    GradientSet::Entry& entry = gradients.entries.emplace_back();
    entry.index = *targets[i];
    entry.tensor = i;
    MS_ASSIGN_OR_RETURN(entry.storage, TensorStorage::Allocate(device, GradientBytes(tensors[i])));
    const uint64_t output_bytes = OutputBytes(tensors[i], schema->spec(entry.index));
    if (!outputs || output_bytes == 0) continue;
    MS_ASSIGN_OR_RETURN(entry.output, TensorStorage::Allocate(device, output_bytes));
  }
  gradients.schema = std::move(schema);
  gradients.tensors = std::move(tensors);
  return gradients;
}

absl::Status RematchGradients(std::shared_ptr<const ModuleSchema> schema, GradientSet& gradients) {
  if (gradients.schema == schema) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const Targets targets,
                      Match(*schema, gradients.tensors, gradients.ignore_frozen));
  std::vector<GradientSet::Entry> entries;
  entries.reserve(gradients.entries.size());
  for (GradientSet::Entry& entry : gradients.entries) {
    if (const std::optional<uint32_t> owner = targets[entry.tensor]) {
      // The norm depends on the parameter's dtype, which may be another now.
      entries.push_back(
          {*owner, entry.tensor, std::move(entry.storage), std::move(entry.output), std::nullopt});
    }
  }
  gradients.ignored = gradients.tensors.size() - entries.size();
  gradients.entries = std::move(entries);
  gradients.schema = std::move(schema);
  return absl::OkStatus();
}

uint64_t GradientSet::reserved_bytes() const {
  uint64_t bytes = reservation.bytes();
  for (const MemoryBudget::Reservation& outputs : of_outputs) bytes += outputs.bytes();
  return bytes;
}

uint64_t GradientSet::staged_bytes() const {
  uint64_t bytes = 0;
  for (const Entry& entry : entries) {
    bytes += entry.storage->size() + (entry.output ? entry.output->size() : 0);
  }
  return bytes;
}

}  // namespace modelstate
