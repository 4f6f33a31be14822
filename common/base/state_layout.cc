#include "common/base/state_layout.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "common/base/digest.h"

namespace modelstate {
namespace {

// What tells tensors apart: of tied ones the owner's name; and the slot.
using Key = std::pair<absl::string_view, absl::string_view>;

Key KeyOf(const TensorSpec& spec) {
  return {spec.is_alias() ? spec.alias_of : spec.name, spec.slot};
}

void AppendU64(uint64_t value, std::string* out) {
  char bytes[8];
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (8 * i));
  out->append(bytes, sizeof(bytes));
}

}  // namespace

StateLayout::StateLayout(absl::Span<const TensorSpec> specs)
    : StateLayout(specs.size(), [specs](size_t i) -> const TensorSpec& { return specs[i]; }) {}

StateLayout::StateLayout(size_t count, SpecAt spec, absl::Span<const uint32_t> order)
    : offsets_(count), nbytes_(count), owns_bytes_(count, true) {
  bool has_aliases = false;
  size_t text_bytes = 0;
  for (uint32_t i = 0; i < count; ++i) {
    nbytes_[i] = spec(i).nbytes();
    has_aliases |= spec(i).is_alias();
    text_bytes += spec(i).name.size() + spec(i).slot.size() + 8 * spec(i).shape.rank() + 40;
  }
  absl::flat_hash_map<Key, uint32_t> first_of;
  std::vector<uint32_t> aliases;
  by_offset_.reserve(count);
  for (uint32_t i = 0; i < count; ++i) {
    // The first of the names that is in the list holds the bytes, also where that is an alias
    // whose owner was not selected.
    if (!has_aliases || first_of.emplace(KeyOf(spec(i)), i).second) {
      by_offset_.push_back(i);
    } else {
      owns_bytes_[i] = false;
      aliases.push_back(i);
    }
  }
  const auto before = [&spec](uint32_t a, uint32_t b) {
    const TensorSpec& first = spec(a);
    const TensorSpec& second = spec(b);
    const size_t width_a = DTypeSize(first.dtype);
    const size_t width_b = DTypeSize(second.dtype);
    if (width_a != width_b) return width_a > width_b;
    return std::tie(first.name, first.slot) < std::tie(second.name, second.slot);
  };
  // One that rises throughout names no tensor twice, and so each.
  bool ordered = order.size() == by_offset_.size();
  for (size_t i = 0; ordered && i < order.size(); ++i) {
    ordered =
        order[i] < count && owns_bytes_[order[i]] && (i == 0 || before(order[i - 1], order[i]));
  }
  if (ordered) {
    by_offset_.assign(order.begin(), order.end());
  } else {
    std::sort(by_offset_.begin(), by_offset_.end(), before);
  }
  for (uint32_t i : by_offset_) {
    offsets_[i] = total_bytes_;
    total_bytes_ += nbytes_[i];
  }
  for (uint32_t i : aliases) offsets_[i] = offsets_[first_of[KeyOf(spec(i))]];

  std::string canonical;
  canonical.reserve(text_bytes);
  for (size_t i = 0; i < count; ++i) {
    const TensorSpec& each = spec(i);
    AppendU64(each.name.size(), &canonical);
    canonical += each.name;
    // The upper bit says that a slot follows.
    const bool has_slot = !each.slot.empty();
    canonical.push_back(static_cast<char>(static_cast<int>(each.dtype) | (has_slot ? 0x80 : 0)));
    AppendU64(each.shape.rank(), &canonical);
    for (int64_t dim : each.shape.dims()) AppendU64(static_cast<uint64_t>(dim), &canonical);
    AppendU64(offsets_[i], &canonical);
    if (!has_slot) continue;
    AppendU64(each.slot.size(), &canonical);
    canonical += each.slot;
  }
  digest_ = Xxh3Hex128(canonical);
}

size_t StateLayout::FindPosition(uint64_t offset) const {
  // The first tensor that ends after `offset`; tensors of zero bytes end where they begin and so
  // are never found.
  auto it = std::partition_point(by_offset_.begin(), by_offset_.end(),
                                 [&](uint32_t i) { return offsets_[i] + nbytes_[i] <= offset; });
  return static_cast<size_t>(it - by_offset_.begin());
}

}  // namespace modelstate
