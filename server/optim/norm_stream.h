#ifndef MODELSTATE_SERVER_OPTIM_NORM_STREAM_H_
#define MODELSTATE_SERVER_OPTIM_NORM_STREAM_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "server/optim/gradient_set.h"
#include "server/optim/instruction_set.h"

namespace modelstate {

// Computes the norm of a gradient from its bytes as they arrive, while they are in the cache: so
// that a step need not read all gradients once more before it may write. The same bits as the
// step's own pass, however the bytes are cut. One object serves one tensor after the other.
// Thread-compatible.
class NormStream {
 public:
  explicit NormStream(InstructionSet set = SupportedInstructionSets().back());
  ~NormStream();

  // A gradient of `dtype` (F64, F32, BF16 or F16) for a parameter of `parameter_dtype`, whose
  // elements are multiplied by 1 / grad_scale.
  void Begin(DType dtype, DType parameter_dtype, double grad_scale);
  // Its next bytes.
  void Update(absl::Span<const uint8_t> bytes);
  // After its last.
  TensorNorm Finish();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_NORM_STREAM_H_
