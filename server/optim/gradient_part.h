#ifndef MODELSTATE_SERVER_OPTIM_GRADIENT_PART_H_
#define MODELSTATE_SERVER_OPTIM_GRADIENT_PART_H_

#include <cstdint>

#include "common/base/dtype.h"

namespace modelstate {

// What one contribution holds for a parameter, in the memory of its device.
struct GradientPart {
  const uint8_t* data = nullptr;
  DType dtype = DType::kF32;
  double inverse_scale = 1;  // multiplied by, first
  double coefficient = 1;    // then by this: its share in the mean
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_GRADIENT_PART_H_
