// What of ModuleInstance goes to another device or dtype.
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "server/module/module_instance.h"
#include "server/state/state_move.h"

namespace modelstate {
namespace {

absl::Status CheckMoveDType(DType dtype) {
  if (IsFloatingPoint(dtype)) return absl::OkStatus();
  const std::string way_out =
      "name a floating-point dtype (F64, F32, F16, BF16, F8_E4M3, F8_E5M2); integer, bool and "
      "complex tensors keep theirs in a move";
  return MakeError(
      Reason::kInvalidField,
      CanRequireGrad(dtype)
          ? absl::StrCat("dtype: a move to torch.", TorchDTypeName(dtype),
                         " would make real parameters complex, which is not offered; ", way_out)
          : absl::StrCat("dtype: nn.Module.to only accepts floating point or complex dtypes, but "
                         "got desired dtype=torch.",
                         TorchDTypeName(dtype), "; ", way_out),
      {{"field", "dtype"}, {"dtype", std::string(DTypeName(dtype))}});
}

// "F16, F32 to BF16, cpu to cpu:1".
std::string MoveDetail(const ModuleVersion& before, const ModuleSchema& after,
                       const Device& target) {
  std::set<absl::string_view> from;
  absl::string_view to;
  for (uint32_t i = 0; i < after.size(); ++i) {
    if (before.schema->spec(i).dtype == after.spec(i).dtype) continue;
    from.insert(DTypeName(before.schema->spec(i).dtype));
    to = DTypeName(after.spec(i).dtype);
  }
  std::string detail;
  if (!from.empty()) detail = absl::StrCat(absl::StrJoin(from, ", "), " to ", to);
  if (before.device != &target) {
    absl::StrAppend(&detail, detail.empty() ? "" : ", ", before.device->name(), " to ",
                    target.name());
  }
  return detail;
}

}  // namespace

absl::StatusOr<VersionRef> ModuleInstance::MoveOnStrand(Device* device,
                                                        std::optional<DType> dtype) {
  MS_RETURN_IF_ERROR(CheckUsable());
  VersionRef current = Current();
  if (current->schema->empty()) return EmptyError();
  if (dtype) MS_RETURN_IF_ERROR(CheckMoveDType(*dtype));
  const std::shared_ptr<const Optimizer> optimizer = this->optimizer();
  Device& target = device != nullptr ? *device : *current->device;
  absl::StatusOr<std::optional<MovedState>> result =
      MoveState(*current, optimizer.get(), optimizer_state_, target, dtype, environment_.compute);
  if (!result.ok()) {
    return Annotate(result.status(), absl::StrCat("module \"", name_, "\" stays as it is"));
  }
  if (!*result) return current;
  MovedState moved = **std::move(result);
  VersionChange change;
  for (uint32_t i = 0; i < moved.schema->size(); ++i) {
    if (moved.cast[i] && moved.schema->owner(i) == i) change.AddElements(moved.schema->spec(i));
  }
  change.set_detail(MoveDetail(*current, *moved.schema, target));

  MS_RETURN_IF_ERROR(SetMemoryAside(optimizer.get(), *moved.schema));

  // Nothing fails from here on.
  std::shared_ptr<ModuleVersion> next = NextVersion(MutationKind::kMove);
  const uint64_t number = next->version.number;
  next->device = &target;
  next->schema = std::move(moved.schema);
  next->storages = std::move(moved.storages);
  for (uint32_t i = 0; i < next->schema->size(); ++i) {
    if (moved.cast[i]) next->changed_version[i] = number;
  }
  if (moved.parameters_cast) parameter_changes_.Add(number);
  next->parameter_changes = parameter_changes_.total();
  optimizer_state_ = std::move(moved.optimizer_state);
  current.reset();  // so that memory of the old place is back where nobody reads it
  VersionRef published = next;
  Publish(std::move(next), optimizer, std::move(change));
  SettlePending(dtype ? "was cast" : "was moved", optimizer.get());
  return published;
}

absl::Status ModuleInstance::BringGradients(Device& device, GradientSet& gradients) const {
  if (gradients.device == &device) return absl::OkStatus();
  for (GradientSet::Entry& entry : gradients.entries) {
    if (&entry.storage->device() == &device) continue;  // from an attempt that failed half-way
    const PushedTensor& tensor = gradients.tensors[entry.tensor];
    MS_ASSIGN_OR_RETURN(entry.storage,
                        ConvertStorage(entry.storage, tensor.dtype, tensor.dtype,
                                       static_cast<uint64_t>(tensor.shape.num_elements()), device,
                                       environment_.compute));
    entry.output = nullptr;
  }
  gradients.device = &device;
  return absl::OkStatus();
}

absl::Status ModuleInstance::CheckStagedFor(const ModuleVersion& current,
                                            absl::Span<const StorageRef> storages,
                                            const OptimizerState* state) const {
  bool here = true;
  for (const StorageRef& storage : storages) {
    here = here && (!storage || &storage->device() == current.device);
  }
  if (state != nullptr) {
    for (const ParameterState& parameter : state->parameters) {
      for (const RefPtr<TensorStorage>& slot : parameter.slots) {
        here = here && (!slot || &slot->device() == current.device);
      }
    }
  }
  if (here) return absl::OkStatus();
  return MakeError(Reason::kStaleBase,
                   absl::StrCat("module \"", name_, "\" moved to ", current.device->name(),
                                " while this load ran: load again"),
                   {{"module", name_},
                    {"device", current.device->name()},
                    {"current", absl::StrCat(current.version.number)}});
}

}  // namespace modelstate
