#ifndef MODELSTATE_COMMON_WIRE_TABLE_SPLITTER_H_
#define MODELSTATE_COMMON_WIRE_TABLE_SPLITTER_H_

#include <cstddef>
#include <functional>
#include <utility>

#include "modelstate/v1/types.pb.h"

namespace modelstate {

// Gives a tensor table piece by piece, each below ~1 MiB on the wire (more only where one entry
// alone is bigger). Thread-compatible.
class TableSplitter {
 public:
  static constexpr size_t kMaxPartBytes = size_t{1} << 20;

  // `fill(index, info)` writes entry `index` of `count` into an empty message; it is called once
  // for each, in order.
  TableSplitter(size_t count, std::function<void(size_t, v1::TensorInfo*)> fill)
      : count_(count), fill_(std::move(fill)) {}

  // Replaces `part` by the next piece; false, with `part` empty, when all were given.
  bool Next(v1::TensorTable* part);

 private:
  size_t count_;
  std::function<void(size_t, v1::TensorInfo*)> fill_;
  size_t next_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_TABLE_SPLITTER_H_
