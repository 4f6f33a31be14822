#ifndef MODELSTATE_SERVER_OPTIM_TREE_SUM_H_
#define MODELSTATE_SERVER_OPTIM_TREE_SUM_H_

#include <cstddef>

#include "absl/types/span.h"

namespace modelstate {

// Sums neighbours, then neighbours of those: a tree that depends on the count alone. Overwrites the
// values.
inline double TreeSum(absl::Span<double> values) {
  if (values.empty()) return 0;
  for (size_t count = values.size(); count > 1; count = (count + 1) / 2) {
    for (size_t i = 0; i < count / 2; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (count % 2 != 0) values[count / 2] = values[count - 1];
  }
  return values[0];
}

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_TREE_SUM_H_
