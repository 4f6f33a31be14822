#include "common/wire/table_splitter.h"

namespace modelstate {

bool TableSplitter::Next(v1::TensorTable* part) {
  part->Clear();
  size_t bytes = 0;
  while (next_ < count_) {
    v1::TensorInfo* info = part->add_tensors();
    fill_(next_, info);
    ++next_;
    constexpr size_t kFraming = 6;  // tag and length of an entry
    bytes += info->ByteSizeLong() + kFraming;
    // The next entry is not known yet: leave room for one of usual size.
    constexpr size_t kRoom = 4096;
    if (bytes + kRoom > kMaxPartBytes) break;
  }
  return part->tensors_size() > 0;
}

}  // namespace modelstate
