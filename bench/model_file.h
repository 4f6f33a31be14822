#ifndef MODELSTATE_BENCH_MODEL_FILE_H_
#define MODELSTATE_BENCH_MODEL_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "common/base/tensor_spec.h"

// Files for benchmarks of loads and saves.
namespace modelstate {

// Of many small and a few large tensors, as in a transformer.
std::vector<TensorSpec> TransformerSpecs(uint64_t bytes);

// A safetensors file with digests of its tensors, or as others write it.
void WriteModelFile(const std::string& path, const std::vector<TensorSpec>& specs,
                    bool with_digests);

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_MODEL_FILE_H_
