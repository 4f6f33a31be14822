#ifndef MODELSTATE_BENCH_PLAIN_OPTIMIZERS_H_
#define MODELSTATE_BENCH_PLAIN_OPTIMIZERS_H_

#include <cstddef>

#include "server/device/buffer_pool.h"
#include "server/device/compute_pool.h"

// What a person would write to step in place: one loop over all that an element needs. The baseline
// of the benchmarks of steps. Compiled with the flags of the step's own loops, for the best
// instruction set of them that the machine has.
namespace modelstate {

struct PlainArrays {
  float* p;
  const float* g;
  float* a;  // exp_avg, or the momentum buffer
  float* b;  // exp_avg_sq
};
using PlainLoop = void (*)(const PlainArrays&, size_t begin, size_t end);

// AdamW and Adam move 28 bytes an element, SGD 20.
void PlainAdamW(const PlainArrays& x, size_t begin, size_t end);
void PlainAdam(const PlainArrays& x, size_t begin, size_t end);
void PlainSgdMomentum(const PlainArrays& x, size_t begin, size_t end);
// a = p + 3 g, 12 bytes an element.
void PlainTriad(const PlainArrays& x, size_t begin, size_t end);

// Parameters and optimizer state of the loops, zeros, in the same kind of memory as a server's.
class PlainModel {
 public:
  explicit PlainModel(size_t elements);
  ~PlainModel();
  PlainModel(const PlainModel&) = delete;
  PlainModel& operator=(const PlainModel&) = delete;

  // One range for each thread of `compute`.
  void Step(PlainLoop loop, const float* gradients, ComputePool& compute);

 private:
  const size_t elements_;
  float* arrays_[3];
};

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_PLAIN_OPTIMIZERS_H_
