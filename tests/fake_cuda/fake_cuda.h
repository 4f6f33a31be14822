#ifndef MODELSTATE_TESTS_FAKE_CUDA_FAKE_CUDA_H_
#define MODELSTATE_TESTS_FAKE_CUDA_FAKE_CUDA_H_

#include <functional>

namespace modelstate {

// Runs all threads of a kernel now.
void FakeRunKernel(unsigned blocks, unsigned threads, const std::function<void()>& body);

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAKE_CUDA_FAKE_CUDA_H_
