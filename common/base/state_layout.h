#ifndef MODELSTATE_COMMON_BASE_STATE_LAYOUT_H_
#define MODELSTATE_COMMON_BASE_STATE_LAYOUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "common/base/tensor_spec.h"

namespace modelstate {

// A half-open range of bytes in a layout's data region.
struct ByteRange {
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t size() const { return end - begin; }
  friend bool operator==(const ByteRange& a, const ByteRange& b) {
    return a.begin == b.begin && a.end == b.end;
  }
};

// Where the bytes of each tensor of a list lie in one contiguous data region: that of a safetensors
// file. Tensors are placed by element width descending, then by name, then by slot, without gaps,
// so each starts at a multiple of its element size; an alias has its owner's place and no bytes of
// its own, or (when the owner is not in the list) takes a place like any tensor.
//
// The digest names the layout: equal digests mean equal names, dtypes, shapes and offsets in the
// same order, slots included, so bytes fetched under one may be joined with bytes fetched under the
// other.
//
// Immutable; shared freely between threads.
class StateLayout {
 public:
  // `specs` in state_dict order, name and slot together unique; borrowed during the call only.
  // The sum of the sizes must fit in int64: callers have checked it against a memory budget.
  explicit StateLayout(absl::Span<const TensorSpec> specs);
  // The same of `count` specs that lie elsewhere. `order` is a guess of by_offset(), as the places
  // that a sender gave: where it is right, nothing is sorted.
  using SpecAt = absl::FunctionRef<const TensorSpec&(size_t index)>;
  StateLayout(size_t count, SpecAt spec, absl::Span<const uint32_t> order = {});
  StateLayout() : StateLayout(absl::Span<const TensorSpec>()) {}

  size_t size() const { return offsets_.size(); }
  uint64_t total_bytes() const { return total_bytes_; }
  // 32 hex digits: XXH3-128 over each tensor's name, dtype, shape and offset, and its slot where
  // it has one.
  const std::string& digest() const { return digest_; }

  // Place of the tensor at `index` of the list.
  ByteRange range(size_t index) const {
    return {offsets_[index], offsets_[index] + nbytes_[index]};
  }
  // Whether the tensor has bytes of its own in the region (false: an alias whose owner is here).
  bool owns_bytes(size_t index) const { return owns_bytes_[index]; }

  // Indices of the tensors that own bytes, by offset; tensors of zero bytes are included.
  absl::Span<const uint32_t> by_offset() const { return by_offset_; }

  // Position in by_offset() of the tensor that holds the byte at `offset`; size of by_offset() when
  // `offset` is at or past the end.
  size_t FindPosition(uint64_t offset) const;

 private:
  std::vector<uint64_t> offsets_;
  std::vector<uint64_t> nbytes_;
  std::vector<bool> owns_bytes_;
  std::vector<uint32_t> by_offset_;
  uint64_t total_bytes_ = 0;
  std::string digest_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_STATE_LAYOUT_H_
