#ifndef MODELSTATE_TESTS_FAKE_CUDA_FAKE_CUDA_H_
#define MODELSTATE_TESTS_FAKE_CUDA_FAKE_CUDA_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

// A CUDA runtime on the host, for any number of threads, that does what a real one may do and a
// program must not rely on: what is enqueued runs as late as it can, in an order between streams
// that the seed says; device memory cannot be touched outside of enqueued work, and is filled with
// NaNs when it is new; pinned memory that a copy still needs, when it is freed, ends the program,
// and so does device memory that any work could still need. There are two GPUs. With
// $FAKE_CUDA_STICKY_AT set, that call and all after it fail.
namespace modelstate {

// Begins anew with a seed; by default it is $FAKE_CUDA_SEED, or 1. REQUIRES: nothing is pending.
void FakeCudaSeed(uint64_t seed);

// The `call`th call of the runtime from now on, counted from 1, returns `error` and does nothing;
// `sticky`: so do all after it. 0: none does. Frees, destroys and what only asks are not counted.
void FakeCudaFail(uint64_t call, cudaError_t error, bool sticky);
// How many have been counted since.
uint64_t FakeCudaCalls();

// Asynchronous copies from or to memory that is not pinned, so far: they wait.
uint64_t FakeCudaPageableCopies();

// Runs all threads of a kernel now.
void FakeRunKernel(unsigned blocks, unsigned threads, const std::function<void()>& body);

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_FAKE_CUDA_FAKE_CUDA_H_
