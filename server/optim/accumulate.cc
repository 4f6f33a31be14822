#include "server/optim/accumulate.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

// One gradient on its way into the sum.
struct Addition {
  GradientSet::Entry* from;
  RefPtr<TensorStorage> fresh;  // where the sum goes; null: over what is there
  GradientSet::Entry* to;       // what is there; null: the first gradient of its parameter
  DType dtype;                  // of the sum
};

}  // namespace

absl::Status AccumulateGradients(GradientSet more, double grad_scale, Device& device,
                                 MemoryBudget& push_budget, StepExecutor& executor,
                                 std::optional<GradientSet>& total) {
  const ModuleSchema& schema = *more.schema;
  absl::flat_hash_map<uint32_t, GradientSet::Entry*> known;
  if (total) {
    for (GradientSet::Entry& entry : total->entries) known.emplace(entry.index, &entry);
  }
  std::vector<Addition> additions;
  uint64_t fresh_bytes = 0;
  for (GradientSet::Entry& entry : more.entries) {
    const TensorSpec& spec = schema.spec(entry.index);
    if (spec.kind != TensorKind::kParameter) continue;
    const DType dtype = spec.dtype == DType::kF64 ? DType::kF64 : DType::kF32;
    const auto it = known.find(entry.index);
    additions.push_back({&entry, nullptr, it == known.end() ? nullptr : it->second, dtype});
    // The first gradient of a parameter becomes the sum where it has its dtype.
    if (it == known.end() && more.tensors[entry.tensor].dtype != dtype) {
      fresh_bytes += static_cast<uint64_t>(spec.shape.num_elements()) * DTypeSize(dtype);
    }
  }
  MS_ASSIGN_OR_RETURN(MemoryBudget::Reservation reservation, push_budget.Reserve(fresh_bytes));
  for (Addition& addition : additions) {
    if (addition.to != nullptr || more.tensors[addition.from->tensor].dtype == addition.dtype) {
      continue;
    }
    const TensorSpec& spec = schema.spec(addition.from->index);
    MS_ASSIGN_OR_RETURN(
        addition.fresh,
        TensorStorage::Allocate(
            device, static_cast<uint64_t>(spec.shape.num_elements()) * DTypeSize(addition.dtype)));
  }

  std::vector<StepExecutor::Addition> sums;
  for (const Addition& addition : additions) {
    const DType from_dtype = more.tensors[addition.from->tensor].dtype;
    const bool as_it_is = addition.to == nullptr && !addition.fresh && grad_scale == 1;
    if (as_it_is) continue;
    TensorStorage& to = addition.to != nullptr ? *addition.to->storage
                        : addition.fresh       ? *addition.fresh
                                               : *addition.from->storage;
    sums.push_back({{addition.from->storage->buffer().data(), from_dtype, 1 / grad_scale, 1},
                    to.MutableBuffer().data(),
                    addition.dtype == DType::kF64,
                    addition.to != nullptr,
                    static_cast<uint64_t>(schema.spec(addition.from->index).shape.num_elements())});
  }
  MS_RETURN_IF_ERROR(executor.Accumulate(sums));

  if (!total) {
    total.emplace();
    total->schema = more.schema;
    total->device = more.device;
  }
  total->ignore_frozen = more.ignore_frozen;
  total->ignored = std::max(total->ignored, more.ignored);
  total->reservation.Merge(std::move(more.reservation));
  total->reservation.Merge(std::move(reservation));
  std::vector<GradientSet::Entry> added;
  for (Addition& addition : additions) {
    if (addition.to != nullptr) continue;
    PushedTensor tensor = more.tensors[addition.from->tensor];
    tensor.dtype = addition.dtype;
    total->tensors.push_back(std::move(tensor));
    GradientSet::Entry& entry = added.emplace_back();
    entry.index = addition.from->index;
    entry.tensor = total->tensors.size() - 1;
    entry.storage = addition.fresh ? std::move(addition.fresh) : std::move(addition.from->storage);
    entry.output = std::move(addition.from->output);
  }
  for (GradientSet::Entry& entry : more.entries) {
    if (schema.spec(entry.index).kind != TensorKind::kBuffer) continue;
    if (const auto it = known.find(entry.index); it != known.end()) {
      it->second->storage = std::move(entry.storage);
      continue;
    }
    total->tensors.push_back(more.tensors[entry.tensor]);
    added.push_back(
        {entry.index, total->tensors.size() - 1, std::move(entry.storage), nullptr, std::nullopt});
  }
  for (GradientSet::Entry& entry : added) total->entries.push_back(std::move(entry));
  // What was added over has given its memory back.
  const uint64_t staged = total->staged_bytes();
  if (total->reservation.bytes() > staged) {
    total->reservation.Shrink(total->reservation.bytes() - staged);
  }
  return absl::OkStatus();
}

}  // namespace modelstate
