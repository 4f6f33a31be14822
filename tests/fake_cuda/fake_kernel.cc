// Runs kernels on the host: the threads of a block as coroutines, which take turns where they
// exchange values.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "server/device/cuda/launch_kernel.h"
#include "tests/fake_cuda/fake_cuda.h"

namespace modelstate {

thread_local FakeIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 64 << 10;

// Goes on with the next thread of its place when one is done: making a context costs more than most
// threads do.
struct Coroutine {
  ucontext_t begin;
  jmp_buf here;  // where it gave way; a jump asks the kernel for nothing, as swapcontext does
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  bool begun = false;
  bool done = false;
  uint64_t given = 0;  // to the others of its group
};

struct Block {
  std::vector<Coroutine> threads;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  size_t running = 0;
};
thread_local Block* block = nullptr;

// Lets all others come here too.
void TakeTurns() {
  if (_setjmp(block->threads[block->running].here) == 0) _longjmp(block->scheduler, 1);
}

void Run() {
  while (true) {
    (*block->body)();
    block->threads[block->running].done = true;
    TakeTurns();
  }
}

void GoOn(Coroutine& thread) {
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.here, 1);
  thread.begun = true;
  getcontext(&thread.begin);
  thread.begin.uc_stack.ss_sp = thread.stack.get();
  thread.begin.uc_stack.ss_size = kStackBytes;
  thread.begin.uc_link = nullptr;
  makecontext(&thread.begin, Run, 0);
  setcontext(&thread.begin);
}

}  // namespace

void __syncthreads() { TakeTurns(); }

uint64_t FakeShuffleDown(uint64_t bits, int delta, int width) {
  const size_t self = block->running;
  block->threads[self].given = bits;
  TakeTurns();
  const size_t place = self % static_cast<size_t>(width) + static_cast<size_t>(delta);
  const size_t other =
      place < static_cast<size_t>(width) ? self + static_cast<size_t>(delta) : self;
  const uint64_t taken = block->threads[other].given;
  TakeTurns();
  return taken;
}

void FakeRunKernel(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  static thread_local Block state;
  if (state.threads.size() < threads) state.threads = std::vector<Coroutine>(threads);
  block = &state;
  block->body = &body;
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    for (unsigned t = 0; t < threads; ++t) block->threads[t].done = false;
    for (bool any = true; any;) {
      any = false;
      for (unsigned t = 0; t < threads; ++t) {
        if (block->threads[t].done) continue;
        any = true;
        block->running = t;
        threadIdx.x = t;
        GoOn(block->threads[t]);
      }
    }
  }
}

}  // namespace modelstate
