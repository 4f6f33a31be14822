#include "server/optim/cuda/step_lists.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/rules/rules.h"

namespace modelstate {
namespace {

static_assert(kCudaBlockElements == kBlockElements);
static_assert(kCudaSlots == kMaxSlots && kMasterPlace == 0);

absl::StatusOr<CudaElement> ElementOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return CudaElement::kF32;
    case DType::kF64:
      return CudaElement::kF64;
    case DType::kF16:
      return CudaElement::kF16;
    case DType::kBF16:
      return CudaElement::kBF16;
    case DType::kF8E4M3:
      return CudaElement::kF8E4M3;
    case DType::kF8E5M2:
      return CudaElement::kF8E5M2;
    default:
      return absl::InternalError(absl::StrCat("a step was given elements of ", DTypeName(dtype)));
  }
}

absl::Status CheckPlace(const void* pointer, size_t size) {
  if (reinterpret_cast<uintptr_t>(pointer) % size == 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("a step was given elements that are at no multiple of ", size, " bytes"));
}

// Which of the rule's kernels updates a tensor.
int VariantOf(const StepPlan& plan, const TensorStep& tensor) {
  const PlannedSlot& first = tensor.slots[kMasterPlace + 1];
  const bool begins = first.data != nullptr && first.from == nullptr;
  int variant = 0;
  AllRules::Visit(plan.algorithm, [&](auto rule) {
    variant = decltype(rule)::Variant(plan.options->hyperparameters[tensor.group], begins);
  });
  return variant;
}

template <typename T>
absl::StatusOr<CudaTensor<T>> MakeTensor(const StepPlan& plan, const TensorStep& step,
                                         std::vector<CudaPart<T>>* parts) {
  CudaTensor<T> tensor{};
  tensor.parameter = step.parameter;
  tensor.output = step.output;
  tensor.elements = step.elements;
  tensor.sign = *plan.options->hyperparameters[step.group].maximize ? T(-1) : T(1);
  tensor.scalars = step.scalars;
  MS_ASSIGN_OR_RETURN(tensor.element, ElementOf(step.dtype));
  MS_RETURN_IF_ERROR(CheckPlace(step.parameter, DTypeSize(step.dtype)));
  MS_RETURN_IF_ERROR(CheckPlace(step.output, DTypeSize(step.dtype)));
  tensor.in_place = step.in_place;
  tensor.vectors = AllowsVectors(step.parameter) && AllowsVectors(step.output);
  constexpr CudaElement kComputed =
      std::is_same_v<T, double> ? CudaElement::kF64 : CudaElement::kF32;
  tensor.plain = step.in_place && tensor.element == kComputed;
  for (size_t place = 0; place < kMaxSlots; ++place) {
    const PlannedSlot& slot = step.slots[place];
    if (place == kMasterPlace && tensor.element == kComputed) continue;  // it is its own master
    MS_RETURN_IF_ERROR(CheckPlace(slot.data, sizeof(T)));
    MS_RETURN_IF_ERROR(CheckPlace(slot.from, sizeof(T)));
    tensor.slots[place] = {reinterpret_cast<T*>(slot.data), reinterpret_cast<const T*>(slot.from),
                           static_cast<T>(slot.initial)};
    tensor.vectors &= AllowsVectors(slot.data) && AllowsVectors(slot.from);
    tensor.plain &= slot.from == slot.data;
  }
  tensor.first_part = static_cast<uint32_t>(parts->size());
  tensor.part_count = step.part_count;
  for (uint32_t k = 0; k < step.part_count; ++k) {
    const GradientPart& part = plan.parts[step.first_part + k];
    MS_ASSIGN_OR_RETURN(parts->emplace_back(), MakeCudaPart<T>(part));
    tensor.vectors &= AllowsVectors(part.data);
  }
  return tensor;
}

}  // namespace

bool AllowsVectors(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
absl::StatusOr<CudaPart<T>> MakeCudaPart(const GradientPart& part) {
  CudaPart<T> made{};
  made.data = part.data;
  made.inverse_scale = static_cast<T>(part.inverse_scale);
  made.coefficient = static_cast<T>(part.coefficient);
  MS_ASSIGN_OR_RETURN(made.element, ElementOf(part.dtype));
  if (std::is_same_v<T, float> && made.element == CudaElement::kF64) {
    return absl::InternalError("a step was given F64 gradients of a narrower parameter");
  }
  MS_RETURN_IF_ERROR(CheckPlace(part.data, DTypeSize(part.dtype)));
  return made;
}

void AppendCudaBlocks(uint32_t tensor, uint64_t elements, std::vector<CudaBlock>* blocks) {
  const uint64_t count = (elements + kCudaBlockElements - 1) / kCudaBlockElements;
  for (uint64_t b = 0; b < count; ++b) blocks->push_back({tensor, static_cast<uint32_t>(b)});
}

template <typename T>
absl::StatusOr<CudaStepLists<T>> MakeCudaStepLists(const StepPlan& plan) {
  CudaStepLists<T> lists;
  std::vector<int> variants;
  for (uint32_t t = 0; t < plan.tensors.size(); ++t) {
    const TensorStep& step = plan.tensors[t];
    if ((step.dtype == DType::kF64) != std::is_same_v<T, double>) continue;
    MS_ASSIGN_OR_RETURN(lists.tensors.emplace_back(), MakeTensor<T>(plan, step, &lists.parts));
    lists.index.push_back(t);
    variants.push_back(VariantOf(plan, step));
  }
  if (!lists.tensors.empty()) {
    for (const RuleScalars& scalars : plan.scalars) {
      for (double value : scalars) lists.scalars.push_back(static_cast<T>(value));
    }
  }
  std::vector<uint32_t> order(lists.tensors.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return variants[a] < variants[b]; });
  lists.first_block.resize(lists.tensors.size());
  for (uint32_t t : order) {
    if (lists.launches.empty() || lists.launches.back().variant != variants[t]) {
      lists.launches.push_back({variants[t], lists.blocks.size(), 0});
    }
    lists.first_block[t] = lists.blocks.size();
    AppendCudaBlocks(t, lists.tensors[t].elements, &lists.blocks);
    auto& launch = lists.launches.back();
    launch.block_count = lists.blocks.size() - launch.first_block;
  }
  return lists;
}

template absl::StatusOr<CudaStepLists<float>> MakeCudaStepLists<float>(const StepPlan&);
template absl::StatusOr<CudaStepLists<double>> MakeCudaStepLists<double>(const StepPlan&);
template absl::StatusOr<CudaPart<float>> MakeCudaPart<float>(const GradientPart&);
template absl::StatusOr<CudaPart<double>> MakeCudaPart<double>(const GradientPart&);

}  // namespace modelstate
