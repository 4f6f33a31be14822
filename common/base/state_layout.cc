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
  for (int shift = 0; shift < 64; shift += 8) out->push_back(static_cast<char>(value >> shift));
}

}  // namespace

StateLayout::StateLayout(absl::Span<const TensorSpec> specs)
    : offsets_(specs.size()), nbytes_(specs.size()), owns_bytes_(specs.size(), true) {
  absl::flat_hash_map<Key, uint32_t> first_of;
  std::vector<uint32_t> aliases;
  for (uint32_t i = 0; i < specs.size(); ++i) {
    nbytes_[i] = specs[i].nbytes();
    // The first of the names that is in the list holds the bytes, also where that is an alias
    // whose owner was not selected.
    if (first_of.emplace(KeyOf(specs[i]), i).second) {
      by_offset_.push_back(i);
    } else {
      owns_bytes_[i] = false;
      aliases.push_back(i);
    }
  }
  std::sort(by_offset_.begin(), by_offset_.end(), [&specs](uint32_t a, uint32_t b) {
    const size_t width_a = DTypeSize(specs[a].dtype);
    const size_t width_b = DTypeSize(specs[b].dtype);
    if (width_a != width_b) return width_a > width_b;
    return std::tie(specs[a].name, specs[a].slot) < std::tie(specs[b].name, specs[b].slot);
  });
  for (uint32_t i : by_offset_) {
    offsets_[i] = total_bytes_;
    total_bytes_ += nbytes_[i];
  }
  for (uint32_t i : aliases) offsets_[i] = offsets_[first_of[KeyOf(specs[i])]];

  std::string canonical;
  for (size_t i = 0; i < specs.size(); ++i) {
    AppendU64(specs[i].name.size(), &canonical);
    canonical += specs[i].name;
    // The upper bit says that a slot follows.
    const bool has_slot = !specs[i].slot.empty();
    canonical.push_back(
        static_cast<char>(static_cast<int>(specs[i].dtype) | (has_slot ? 0x80 : 0)));
    AppendU64(specs[i].shape.rank(), &canonical);
    for (int64_t dim : specs[i].shape.dims()) AppendU64(static_cast<uint64_t>(dim), &canonical);
    AppendU64(offsets_[i], &canonical);
    if (!has_slot) continue;
    AppendU64(specs[i].slot.size(), &canonical);
    canonical += specs[i].slot;
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
