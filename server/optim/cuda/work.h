#ifndef MODELSTATE_SERVER_OPTIM_CUDA_WORK_H_
#define MODELSTATE_SERVER_OPTIM_CUDA_WORK_H_

#include <cstddef>
#include <cstdint>

#include "server/rules/rule_info.h"

// What the kernels read, in device memory: a StepPlan flattened. Plain structs, free of Abseil. T
// is the type that a step computes in, float or double; their numbers are rounded to it already.
namespace modelstate {

inline constexpr uint64_t kCudaBlockElements = 4096;  // kBlockElements of step_plan.h
inline constexpr size_t kCudaSlots = 1 + kMaxRuleSlots;

// How many elements one thread takes at once: 16 bytes of T.
template <typename T>
inline constexpr int kCudaWidth = 16 / sizeof(T);

// How elements are stored.
enum class CudaElement : uint8_t { kF32, kF64, kF16, kBF16, kF8E4M3, kF8E5M2 };

// GradientPart.
template <typename T>
struct CudaPart {
  const void* data;
  T inverse_scale;
  T coefficient;
  CudaElement element;
};

// PlannedSlot.
template <typename T>
struct CudaSlot {
  T* data;        // null: there is none
  const T* from;  // null: it begins now
  T initial;
};

// TensorStep.
template <typename T>
struct CudaTensor {
  const void* parameter;
  void* output;
  uint64_t elements;
  CudaSlot<T> slots[kCudaSlots];
  T sign;               // -1: maximize
  uint32_t first_part;  // in the parts
  uint32_t part_count;
  uint32_t scalars;     // in the scalars, kMaxRuleScalars each
  CudaElement element;  // of parameter and output; F64 where T is double, and only there
  bool in_place;        // the gradient is in `output`, as T
  // Every pointer is a multiple of 16: kCudaWidth<T> elements are taken at once.
  bool vectors;
  // Parameter of type T, gradient and slots in place, no limit for elements: the common case.
  bool plain;
};

// Block `block` of a tensor: the elements from block * kCudaBlockElements on.
struct CudaBlock {
  uint32_t tensor;
  uint32_t block;
};

struct CudaBlockNorm {
  double sum_of_squares;
  uint64_t finite;
};

template <typename T>
struct CudaNormWork {
  const CudaBlock* blocks;
  uint64_t block_count;
  const CudaTensor<T>* tensors;
  const CudaPart<T>* parts;
  CudaBlockNorm* norms;  // one for each block
};

// The norms of one tensor's blocks.
struct CudaJoin {
  uint64_t first;
  uint64_t count;
};

struct CudaJoinWork {
  const CudaJoin* joins;
  uint64_t join_count;
  CudaBlockNorm* norms;    // of the blocks; overwritten
  CudaBlockNorm* scratch;  // as many
  CudaBlockNorm* results;  // one for each join; only written
};

template <typename T>
struct CudaUpdateWork {
  const CudaBlock* blocks;
  uint64_t block_count;
  const CudaTensor<T>* tensors;
  const CudaPart<T>* parts;
  const T* scalars;
  T clip_coef;
  T clip_value;  // 0: none
};

// to[i] = (add ? to[i] : 0) + from[i] * from.inverse_scale * from.coefficient. Without `add` the
// two may be the same elements.
template <typename T>
struct CudaAddition {
  CudaPart<T> from;
  T* to;
  uint64_t elements;
  bool add;
  bool vectors;
};

template <typename T>
struct CudaAccumulateWork {
  const CudaBlock* blocks;  // `tensor` counts the additions
  uint64_t block_count;
  const CudaAddition<T>* additions;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_WORK_H_
