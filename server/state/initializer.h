#ifndef MODELSTATE_SERVER_STATE_INITIALIZER_H_
#define MODELSTATE_SERVER_STATE_INITIALIZER_H_

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/tensor_spec.h"
#include "server/device/compute_pool.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// The random initializers of torch.nn.init, with its names and defaults. Value type.
struct Initializer {
  enum class Kind : uint8_t {
    kUniform,
    kNormal,
    kKaimingUniform,
    kKaimingNormal,
    kXavierUniform,
    kXavierNormal,
  };
  Kind kind = Kind::kUniform;
  double low = 0;  // uniform
  double high = 1;
  double mean = 0;  // normal
  double std = 1;
  double a = 0;  // kaiming: negative slope of leaky_relu
  std::string mode = "fan_in";
  std::string nonlinearity = "leaky_relu";
  double gain = 1;  // xavier
};

// torch.nn.init.calculate_gain(nonlinearity, param); its ValueError is INVALID_FIELD.
absl::StatusOr<double> CalculateGain(absl::string_view nonlinearity, double param);

// What is left of an Initializer when a tensor's shape and dtype are known: numbers from
// [first, second), or with mean `first` and standard deviation `second`.
struct Draw {
  bool normal = false;
  double first = 0;
  double second = 0;
};

// Checks an initializer for a tensor, without drawing anything. INVALID_FIELD, in torch's words
// where it has some: a dtype that is not floating-point, numbers that are not finite or out of
// order, a bound that the dtype cannot hold, fewer than two dimensions for kaiming and xavier, an
// unknown mode or nonlinearity. A tensor without elements needs no fans.
absl::StatusOr<Draw> ResolveInitializer(const Initializer& initializer, const TensorSpec& spec);

// Element `index` of the tensor `name`, before it is rounded to the tensor's dtype. The numbers
// depend on (seed, name, index) and the draw alone, and are made of +, -, *, / and square roots of
// doubles, which IEEE 754 rounds the same everywhere: every machine gets the same bits.
//
//   block   = Philox4x32-10 with the key (seed mod 2^32, seed / 2^32) of the counter
//             (b mod 2^32, b / 2^32, h mod 2^32, h / 2^32), b = index / 2, h = XXH3-64(name)
//   bits[k] = (block[2k] + 2^32 * block[2k + 1]) / 2^11, for k = 0, 1: 53 bits
//   uniform = low + (high - low) * (bits[index mod 2] * 2^-53)
//   normal  = mean + std * z, Box-Muller: r = sqrt(-2 ln((bits[0] + 1) * 2^-53)),
//             t = 2 pi * (bits[1] * 2^-53), z = r * cos(t) for even indices, r * sin(t) for odd
class ElementStream {
 public:
  ElementStream(const Draw& draw, uint64_t seed, absl::string_view name);
  // Elements 2 * block and 2 * block + 1.
  std::pair<double, double> Pair(uint64_t block) const;

 private:
  const Draw draw_;
  const uint64_t seed_;
  const uint64_t name_hash_;
};

// Fills the whole storage of `spec` with elements 0, 1, ..., each rounded once to the dtype (to
// nearest, ties to even), on the threads of `compute`. REQUIRES: `draw` is of
// ResolveInitializer(..., spec); the storage has spec.nbytes() and is not yet published.
absl::Status FillStorage(const Draw& draw, uint64_t seed, const TensorSpec& spec,
                         ComputePool& compute, TensorStorage& storage);

namespace initializer_internal {

// Philox4x32-10 of Salmon et al. (SC11) on 64-bit halves, low word first.
struct PhiloxBlock {
  uint32_t words[4];
};
PhiloxBlock Philox(uint64_t key, uint64_t counter_low, uint64_t counter_high);

// ln(x) for x in (0, 1], off by less than 1e-15 relatively, and by less than 2e-16 near 1.
double Log(double x);

// cos and sin of 2 pi * turns for turns in [0, 1), multiples of 2^-53; off by less than 3e-16.
struct CosSin {
  double cos;
  double sin;
};
CosSin CosSinOfTurns(double turns);

}  // namespace initializer_internal
}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_INITIALIZER_H_
