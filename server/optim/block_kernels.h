#ifndef MODELSTATE_SERVER_OPTIM_BLOCK_KERNELS_H_
#define MODELSTATE_SERVER_OPTIM_BLOCK_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "server/optim/instruction_set.h"
#include "server/optim/step_plan.h"

namespace modelstate {

// What one block of gradients contributes to the norm.
struct BlockNorm {
  double sum_of_squares = 0;
  bool finite = true;
};

// The loops over elements, one table for each instruction set (block_kernels.cc is compiled once
// for each). None of them fails. Thread-safe on disjoint elements.
//
// They run with round-to-nearest and subnormals, whatever their thread has set. `tensor` is one of
// plan.tensors.
struct BlockKernels {
  // Over the mean gradient's elements [begin, end), at most kBlockElements of them: squares in
  // double, in lanes that are joined in a fixed tree. Reads only.
  BlockNorm (*norm)(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end);
  // The same over the first `n` elements of one part, at most kBlockElements, times its
  // inverse_scale; in double where `wide`. They need not be aligned.
  BlockNorm (*part_norm)(const GradientPart& part, bool wide, size_t n);
  // Updates the elements [begin, end) of parameter and slots.
  void (*update)(const StepPlan& plan, const TensorStep& tensor, uint64_t begin, uint64_t end);
  // to[i] = (add ? to[i] : 0) + from[i] * from.inverse_scale, over [begin, end); `to` is F64 where
  // `wide`, else F32. Without `add` the two may be the same elements.
  void (*accumulate)(const GradientPart& from, uint8_t* to, bool wide, bool add, uint64_t begin,
                     uint64_t end);
};

// REQUIRES: `set` is one of SupportedInstructionSets().
const BlockKernels& GetBlockKernels(InstructionSet set);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_BLOCK_KERNELS_H_
