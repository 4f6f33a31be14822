#include "server/optim/cuda/step_lists.h"

#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/base/status.h"
#include "server/optim/default_arithmetic.h"
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

bool IsWide(const TensorStep& step) { return step.dtype == DType::kF64; }

// The gradient is where the new parameter goes, and nothing else is to be done with it.
bool IsPlain(const StepPlan& plan, const TensorStep& step) {
  const bool limited = IsWide(step) ? plan.clip_value > 0 : static_cast<float>(plan.clip_value) > 0;
  if (limited || !step.in_place || (step.dtype != DType::kF32 && !IsWide(step))) return false;
  for (size_t place = kMasterPlace + 1; place < kMaxSlots; ++place) {
    if (step.slots[place].from != step.slots[place].data) return false;
  }
  return true;
}

int VariantOf(const StepPlan& plan, uint32_t group, bool begins) {
  int variant = 0;
  AllRules::Visit(plan.algorithm, [&](auto rule) {
    variant = decltype(rule)::Variant(plan.options->hyperparameters[group], begins);
  });
  return variant;
}

// A kernel as a small number.
constexpr int kMaxVariants = 16;
constexpr int kKeys = 2 * 2 * kMaxVariants;
int KeyOf(bool wide, CudaVariant variant) {
  return (wide * kMaxVariants + variant.variant) * 2 + variant.plain;
}

template <typename T>
absl::Status FillTensor(const StepPlan& plan, const TensorStep& step, CudaPart<T>* parts,
                        CudaTensor<T>* to) {
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
  tensor.plain = IsPlain(plan, step);
  tensor.vectors = AllowsVectors(step.parameter) && AllowsVectors(step.output);
  for (size_t place = 0; place < kMaxSlots; ++place) {
    // Where nothing is rounded, the parameter is its own master.
    if (place == kMasterPlace && (step.dtype == DType::kF32 || IsWide(step))) continue;
    const PlannedSlot& slot = step.slots[place];
    MS_RETURN_IF_ERROR(CheckPlace(slot.data, sizeof(T)));
    MS_RETURN_IF_ERROR(CheckPlace(slot.from, sizeof(T)));
    tensor.slots[place] = {reinterpret_cast<T*>(slot.data), reinterpret_cast<const T*>(slot.from),
                           static_cast<T>(slot.initial)};
    tensor.vectors &= AllowsVectors(slot.data) && AllowsVectors(slot.from);
  }
  tensor.first_part = step.first_part;
  tensor.part_count = step.part_count;
  for (uint32_t k = step.first_part; k < step.first_part + step.part_count; ++k) {
    MS_ASSIGN_OR_RETURN(parts[k], MakeCudaPart<T>(plan.parts[k]));
    tensor.vectors &= AllowsVectors(plan.parts[k].data);
  }
  *to = tensor;
  return absl::OkStatus();
}

// Spreads what has the keys' kernels of one half: their launches, in the keys' order.
void SpreadHalf(bool wide, const std::vector<uint64_t>& blocks_of_key, CudaStepLayout::Half* half,
                std::vector<uint64_t>* next_block) {
  for (int variant = 0; variant < kMaxVariants; ++variant) {
    for (const bool plain : {false, true}) {
      const int key = KeyOf(wide, {variant, plain});
      if (blocks_of_key[key] == 0) continue;
      half->launches.push_back({{variant, plain}, half->blocks, blocks_of_key[key]});
      (*next_block)[key] = half->blocks;
      half->blocks += blocks_of_key[key];
    }
  }
}

}  // namespace

CudaStepLayout MakeCudaStepLayout(const StepPlan& plan, ComputePool& compute) {
  const size_t count = plan.tensors.size();
  std::vector<uint8_t> keys(count);
  ForEachPiece(count, compute, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      const TensorStep& step = plan.tensors[t];
      const PlannedSlot& first = step.slots[kMasterPlace + 1];
      const bool begins = first.data != nullptr && first.from == nullptr;
      keys[t] = static_cast<uint8_t>(
          KeyOf(IsWide(step), {VariantOf(plan, step.group, begins), IsPlain(plan, step)}));
    }
  });
  std::vector<uint64_t> blocks_of_key(kKeys), next_block(kKeys);
  for (size_t t = 0; t < count; ++t) {
    blocks_of_key[keys[t]] += CudaBlockCount(plan.tensors[t].elements);
  }
  CudaStepLayout layout;
  SpreadHalf(false, blocks_of_key, &layout.narrow, &next_block);
  SpreadHalf(true, blocks_of_key, &layout.wide, &next_block);
  layout.place.resize(count);
  layout.first_block.resize(count);
  for (size_t t = 0; t < count; ++t) {
    layout.place[t] = (IsWide(plan.tensors[t]) ? layout.wide : layout.narrow).tensors++;
    layout.first_block[t] = next_block[keys[t]];
    next_block[keys[t]] += CudaBlockCount(plan.tensors[t].elements);
  }
  return layout;
}

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

template <typename T>
absl::Status FillCudaStepLists(const StepPlan& plan, const CudaStepLayout& layout,
                               ComputePool& compute, const CudaStepLists<T>& lists) {
  T* scalar = lists.scalars;
  for (const RuleScalars& scalars : plan.scalars) {
    for (double value : scalars) *scalar++ = static_cast<T>(value);
  }
  absl::Mutex mutex;
  absl::Status status;
  ForEachPiece(plan.tensors.size(), compute, [&](size_t begin, size_t end) {
    const DefaultArithmetic arithmetic;  // of what is rounded
    for (size_t t = begin; t < end; ++t) {
      const TensorStep& step = plan.tensors[t];
      if (IsWide(step) != std::is_same_v<T, double>) continue;
      const uint32_t place = layout.place[t];
      const absl::Status filled = FillTensor(plan, step, lists.parts, lists.tensors + place);
      if (!filled.ok()) {
        absl::MutexLock lock(&mutex);
        status.Update(filled);
        return;
      }
      CudaBlock* blocks = lists.blocks + layout.first_block[t];
      const uint64_t count = CudaBlockCount(step.elements);
      for (uint64_t b = 0; b < count; ++b) blocks[b] = {place, static_cast<uint32_t>(b)};
    }
  });
  return status;
}

template absl::Status FillCudaStepLists<float>(const StepPlan&, const CudaStepLayout&, ComputePool&,
                                               const CudaStepLists<float>&);
template absl::Status FillCudaStepLists<double>(const StepPlan&, const CudaStepLayout&,
                                                ComputePool&, const CudaStepLists<double>&);
template absl::StatusOr<CudaPart<float>> MakeCudaPart<float>(const GradientPart&);
template absl::StatusOr<CudaPart<double>> MakeCudaPart<double>(const GradientPart&);

}  // namespace modelstate
