#ifndef MODELSTATE_SERVER_OPTIM_INSTRUCTION_SET_H_
#define MODELSTATE_SERVER_OPTIM_INSTRUCTION_SET_H_

#include <cstdint>
#include <vector>

namespace modelstate {

// What the kernels of a step are compiled for. The result has the same bits for each.
enum class InstructionSet : uint8_t {
  kBaseline,   // x86-64-v2, or what another machine's compiler takes by default
  kX86_64_V3,  // 256-bit vectors
  kX86_64_V4,  // AVX-512
};

// "x86-64-v3".
const char* InstructionSetName(InstructionSet set);

// Those that this machine can run, the best last; never empty.
const std::vector<InstructionSet>& SupportedInstructionSets();

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_INSTRUCTION_SET_H_
