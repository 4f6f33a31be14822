#ifndef MODELSTATE_COMMON_FORMAT_PICKLE_LISTS_H_
#define MODELSTATE_COMMON_FORMAT_PICKLE_LISTS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "common/format/pickle.h"

namespace modelstate {

// The items of a PickleTree's tuples, lists and dicts in one vector, while it is parsed. Lists grow
// in turns: what comes to one after another has grown lies apart from its first items, until Join.
// So none of them has memory of its own, and none is moved while it grows. Thread-compatible.
// Internal to the folder.
class PickleLists {
 public:
  using Id = PickleTree::Id;

  // The list of `Append` and `Join` is two fields of its node: `place`, where its first items are
  // (as Node::number), and `later`, kNone or where others are.
  static constexpr uint32_t kNone = 0xFFFFFFFF;

  // Into `items`, which is borrowed.
  explicit PickleLists(std::vector<Id>* items) : items_(*items) {}

  // All of these return nothing, or false, where there would be more than 2^32 items.
  // `added` must not be of the vector. Where they are.
  std::optional<uint32_t> Add(absl::Span<const Id> added);
  bool Append(absl::Span<const Id> added, int64_t* place, uint32_t* later);
  // Brings the items of a list together.
  bool Join(int64_t* place, uint32_t* later);

  // Whether any list is to be joined, or was.
  bool scattered() const { return !extents_.empty(); }

 private:
  struct Extent {
    uint32_t begin = 0;
    uint32_t size = 0;
    uint32_t next = 0;  // of those of a list after its first; of the last the first of them
  };

  std::optional<uint32_t> MakeRoom(size_t count);
  void Copy(Extent from, uint32_t to);

  std::vector<Id>& items_;
  std::deque<Extent> extents_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_PICKLE_LISTS_H_
