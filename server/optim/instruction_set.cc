#include "server/optim/instruction_set.h"

#include "server/optim/block_kernels.h"

namespace modelstate {

namespace kernels_baseline {
extern const BlockKernels kKernels;
}
#ifdef MODELSTATE_X86_64_KERNELS
namespace kernels_v3 {
extern const BlockKernels kKernels;
}
namespace kernels_v4 {
extern const BlockKernels kKernels;
}
#endif

const char* InstructionSetName(InstructionSet set) {
  switch (set) {
    case InstructionSet::kX86_64_V3:
      return "x86-64-v3";
    case InstructionSet::kX86_64_V4:
      return "x86-64-v4";
    case InstructionSet::kBaseline:
      break;
  }
  return "baseline";
}

const std::vector<InstructionSet>& SupportedInstructionSets() {
  static const auto* sets = [] {
    auto* supported = new std::vector<InstructionSet>{InstructionSet::kBaseline};
#ifdef MODELSTATE_X86_64_KERNELS
    // What of a level a compiler emits for these loops.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v3) supported->push_back(InstructionSet::kX86_64_V3);
    if (v4) supported->push_back(InstructionSet::kX86_64_V4);
#endif
    return supported;
  }();
  return *sets;
}

const BlockKernels& GetBlockKernels(InstructionSet set) {
#ifdef MODELSTATE_X86_64_KERNELS
  if (set == InstructionSet::kX86_64_V4) return kernels_v4::kKernels;
  if (set == InstructionSet::kX86_64_V3) return kernels_v3::kKernels;
#endif
  (void)set;
  return kernels_baseline::kKernels;
}

}  // namespace modelstate
