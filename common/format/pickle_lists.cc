#include "common/format/pickle_lists.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace modelstate {
namespace {

int64_t Place(uint32_t begin, uint32_t size) {
  return static_cast<int64_t>(uint64_t{size} << 32 | begin);
}

}  // namespace

std::optional<uint32_t> PickleLists::MakeRoom(size_t count) {
  const size_t begin = items_.size();
  if (begin + count > std::numeric_limits<uint32_t>::max()) return std::nullopt;
  if (begin + count > items_.capacity()) {
    items_.reserve(std::max(begin + count, items_.capacity() + items_.capacity() / 2));
  }
  items_.resize(begin + count);
  return static_cast<uint32_t>(begin);
}

std::optional<uint32_t> PickleLists::Add(absl::Span<const Id> added) {
  const std::optional<uint32_t> begin = MakeRoom(added.size());
  if (begin) std::copy(added.begin(), added.end(), items_.begin() + *begin);
  return begin;
}

bool PickleLists::Append(absl::Span<const Id> added, int64_t* place, uint32_t* later) {
  const std::optional<uint32_t> begin = Add(added);
  if (!begin) return false;
  const uint32_t size = static_cast<uint32_t>(added.size());
  const uint32_t next = static_cast<uint32_t>(extents_.size());
  if (*later == kNone) {
    const uint32_t first = static_cast<uint32_t>(*place);
    const uint32_t first_size = static_cast<uint32_t>(static_cast<uint64_t>(*place) >> 32);
    if (first_size == 0) {
      *place = Place(*begin, size);
    } else if (first + first_size == *begin) {
      *place = Place(first, first_size + size);
    } else {
      extents_.push_back({*begin, size, next});
      *later = next;
    }
    return true;
  }
  Extent& last = extents_[*later];
  if (last.begin + last.size == *begin) {
    last.size += size;
    return true;
  }
  const uint32_t first_later = std::exchange(last.next, next);
  extents_.push_back({*begin, size, first_later});
  *later = next;
  return true;
}

void PickleLists::Copy(Extent from, uint32_t to) {
  std::copy_n(items_.begin() + from.begin, from.size, items_.begin() + to);
}

bool PickleLists::Join(int64_t* place, uint32_t* later) {
  if (*later == kNone) return true;
  const Extent first = {static_cast<uint32_t>(*place),
                        static_cast<uint32_t>(static_cast<uint64_t>(*place) >> 32), 0};
  size_t total = first.size;
  uint32_t at = *later;
  do {
    at = extents_[at].next;
    total += extents_[at].size;
  } while (at != *later);
  const std::optional<uint32_t> begin = MakeRoom(total);
  if (!begin) return false;
  Copy(first, *begin);
  uint32_t to = *begin + first.size;
  do {
    at = extents_[at].next;
    Copy(extents_[at], to);
    to += extents_[at].size;
  } while (at != *later);
  *place = Place(*begin, static_cast<uint32_t>(total));
  *later = kNone;
  return true;
}

}  // namespace modelstate
