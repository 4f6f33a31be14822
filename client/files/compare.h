#ifndef MODELSTATE_CLIENT_FILES_COMPARE_H_
#define MODELSTATE_CLIENT_FILES_COMPARE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/files/tensor_source.h"

namespace modelstate::client {

// How a tensor of two sources compares.
struct TensorComparison {
  std::string name;
  bool equal = false;  // in dtype, shape and every bit
  // For people: "equal", "only in a.safetensors", "shape [2] and [3]", "dtype F32 and BF16, 17 of
  // 400 elements differ".
  std::string what;
  // The rest only where the shapes are equal. Elements of two dtypes are compared by value, without
  // rounding either; those of one dtype bit by bit; a complex one counts as two.
  bool compared = false;
  uint64_t elements = 0;
  uint64_t different = 0;
  double max_abs_difference = 0;  // over pairs that are both finite, as the nearest double
  // Of two integer dtypes (BOOL is one) exactly; UINT64_MAX: that or more.
  std::optional<uint64_t> max_integer_difference;
  uint64_t nonfinite_a = 0;
  uint64_t nonfinite_b = 0;
};

struct Comparison {
  std::vector<TensorComparison> tensors;  // those of `a` in its order, then those only in `b`
  uint64_t equal = 0;
};

// Reads a few tensors of each at a time, and larger ones in parts: memory for 32 MiB of each. What
// a source cannot read in parts, of a module or strided in its file, is held whole. Errors are
// those of the sources.
absl::StatusOr<Comparison> CompareTensors(TensorSource& a, TensorSource& b);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_COMPARE_H_
