#ifndef MODELSTATE_BENCH_MODEL_FILE_H_
#define MODELSTATE_BENCH_MODEL_FILE_H_

#include <cstddef>
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

// `size` bytes and 2 MiB of new anonymous memory in huge pages, untouched.
uint8_t* HugePages(size_t size);

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_MODEL_FILE_H_
