// Runs kernels on the host: the threads of a block as coroutines, which take turns where they
// exchange values.
#include <ucontext.h>

#include <memory>
#include <vector>

#include "server/optim/cuda/launch_kernel.h"
#include "tests/fake_cuda/fake_cuda.h"

namespace modelstate {

thread_local FakeIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 64 << 10;

struct Coroutine {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  bool done = false;
  uint64_t given = 0;  // to the others of its group
};

struct Block {
  std::vector<Coroutine> threads;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  size_t running = 0;
};
thread_local Block* block = nullptr;

void Enter() {
  Coroutine& self = block->threads[block->running];
  (*block->body)();
  self.done = true;
  swapcontext(&self.context, &block->scheduler);
}

// Lets all others come here too.
void TakeTurns() { swapcontext(&block->threads[block->running].context, &block->scheduler); }

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
    for (unsigned t = 0; t < threads; ++t) {
      Coroutine& thread = block->threads[t];
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, Enter, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (unsigned t = 0; t < threads; ++t) {
        if (block->threads[t].done) continue;
        any = true;
        block->running = t;
        threadIdx.x = t;
        swapcontext(&block->scheduler, &block->threads[t].context);
      }
    }
  }
}

}  // namespace modelstate
