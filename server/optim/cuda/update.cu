#include <type_traits>

#include "server/optim/cuda/launch_rule.h"
#include "server/rules/rules.h"

namespace modelstate {
namespace {

template <typename T>
cudaError_t Launch(Algorithm algorithm, CudaVariant variant, const CudaUpdateWork<T>& work,
                   cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  AllRules::Visit(algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    // AdamW differs from Adam in its defaults alone: they share their kernels.
    using Kernels = std::conditional_t<std::is_same_v<Rule, AdamW>, Adam, Rule>;
    error = LaunchRule<Kernels, T>(variant, work, stream);
  });
  return error;
}

}  // namespace

cudaError_t LaunchUpdate(Algorithm algorithm, CudaVariant variant,
                         const CudaUpdateWork<float>& work, cudaStream_t stream) {
  return Launch(algorithm, variant, work, stream);
}

cudaError_t LaunchUpdate(Algorithm algorithm, CudaVariant variant,
                         const CudaUpdateWork<double>& work, cudaStream_t stream) {
  return Launch(algorithm, variant, work, stream);
}

}  // namespace modelstate
