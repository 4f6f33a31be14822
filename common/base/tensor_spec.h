#ifndef MODELSTATE_COMMON_BASE_TENSOR_SPEC_H_
#define MODELSTATE_COMMON_BASE_TENSOR_SPEC_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/base/dtype.h"
#include "common/base/shape.h"

namespace modelstate {

// The numbers are those of `modelstate.v1.TensorKind` on the wire.
enum class TensorKind : uint8_t {
  kParameter = 1,
  kBuffer = 2,
  kGradient = 3,
  kOptimizerState = 4,
};

// "parameter", "buffer", "gradient", "optimizer state": for messages to people.
const char* TensorKindName(TensorKind kind);

// Of a name that a caller gives; files may have longer ones.
inline constexpr size_t kMaxTensorNameBytes = 1024;
inline constexpr size_t kMaxSlotBytes = 64;

// What is known of a tensor without its elements. Elements are stored contiguous, row-major and
// little-endian. Value type, thread-compatible.
struct TensorSpec {
  std::string name;
  TensorKind kind = TensorKind::kParameter;
  DType dtype = DType::kF32;
  Shape shape;
  bool requires_grad = true;  // parameters only; false means frozen
  bool persistent = true;     // buffers only; false means not in the state_dict
  // Not empty for the second and later names of a tied tensor: the first name, which owns the
  // storage. Kind, dtype and shape equal the owner's.
  std::string alias_of;
  // Optimizer state only: the key in torch's optimizer state, "exp_avg"; `name` is the parameter's.
  // Name and slot together tell one tensor of a list from another.
  std::string slot;

  bool is_alias() const { return !alias_of.empty(); }
  // Bytes of the elements, also for an alias.
  uint64_t nbytes() const { return static_cast<uint64_t>(shape.num_elements()) * DTypeSize(dtype); }
};

// For messages to people: "conv1.weight", or "exp_avg/conv1.weight".
std::string DisplayName(const TensorSpec& spec);

// Identity of a module's state. `incarnation` is unique per module creation or server start, so
// that a number of an earlier life is never taken for one of this. `number` is positive and grows
// by one per published mutation; 0 stands for "none".
struct Version {
  uint64_t incarnation = 0;
  uint64_t number = 0;

  friend bool operator==(const Version& a, const Version& b) {
    return a.incarnation == b.incarnation && a.number == b.number;
  }
  friend bool operator!=(const Version& a, const Version& b) { return !(a == b); }
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_TENSOR_SPEC_H_
