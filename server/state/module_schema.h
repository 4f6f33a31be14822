#ifndef MODELSTATE_SERVER_STATE_MODULE_SCHEMA_H_
#define MODELSTATE_SERVER_STATE_MODULE_SCHEMA_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/selection.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"
#include "server/state/selection_cache.h"

namespace modelstate {

// Which of a module's names a listing shows. The numbers are those of `modelstate.v1.ListView`.
enum class ListView : uint8_t {
  kAll = 0,        // every registered name
  kNamed = 1,      // named_parameters(), named_buffers(): of tied names the first
  kStateDict = 2,  // state_dict(): all tied names, no non-persistent buffer
};

// Part of a module's tensors with the layout of their data region. Immutable.
struct StateView {
  std::vector<uint32_t> indices;  // into the schema, ascending
  // Of those, dtype as read (after float_dtype); then of optimizer state, where the view has some.
  std::vector<TensorSpec> specs;
  StateLayout layout;  // of `specs`
};

// The names, kinds, dtypes and shapes of a module, in state_dict order: everything but the
// elements. Immutable; shared by all versions until one of them changes it.
class ModuleSchema {
 public:
  // Checks what torch's register_parameter and register_buffer check, for dotted names:
  // INVALID_FIELD for an empty or taken name, a kind other than parameter or buffer, a parameter
  // whose dtype cannot require grad while requires_grad is true; UNKNOWN_KEY for an alias whose
  // owner is not an earlier tensor of the same kind, dtype and shape. Sums of sizes are checked for
  // overflow, and that there are no more than 1,000,000 tensors.
  static absl::StatusOr<std::shared_ptr<const ModuleSchema>> Create(std::vector<TensorSpec> specs,
                                                                    uint64_t revision);

  uint64_t revision() const { return revision_; }  // >= 1; grows with every change
  size_t size() const { return specs_.size(); }
  bool empty() const { return specs_.empty(); }
  absl::Span<const TensorSpec> specs() const { return specs_; }
  const TensorSpec& spec(uint32_t index) const { return specs_[index]; }

  std::optional<uint32_t> Find(absl::string_view name) const;
  // The tensor that holds the bytes: `index` itself, or the owner of an alias.
  uint32_t owner(uint32_t index) const { return owners_[index]; }

  // The state_dict: everything but non-persistent buffers, dtypes as they are.
  const std::shared_ptr<const StateView>& state_dict() const { return state_dict_; }

  // The part that `selection` selects; the cached state_dict() when that is everything, and what it
  // was before when it was asked for recently.
  // NOT_FOUND TENSOR_NOT_FOUND for a name that no tensor has.
  absl::StatusOr<std::shared_ptr<const StateView>> View(const Selection& selection) const;

  // The part of `view`, which is one of this schema's, whose tensors `keep` says true of. It is
  // asked of owners, and so answers alike for tied tensors.
  std::shared_ptr<const StateView> Part(const StateView& view,
                                        absl::FunctionRef<bool(uint32_t owner)> keep) const;

  using Listing = std::shared_ptr<const std::vector<uint32_t>>;
  // Indices of the tensors of `kind` (parameter or buffer) that `view` shows and `selection`
  // selects, ascending. Made once for each of the views, and kept for recent selections: asking for
  // it again, as each page of a listing does, does not look at the tensors. `selection`'s
  // include_non_persistent and float_dtype do not matter. NOT_FOUND TENSOR_NOT_FOUND as above.
  absl::StatusOr<Listing> List(TensorKind kind, ListView view, const Selection& selection) const;

  // The same schema with requires_grad of these parameters set, revision + 1.
  std::shared_ptr<const ModuleSchema> WithRequiresGrad(absl::Span<const uint32_t> parameters,
                                                       bool requires_grad) const;

  // Counts without aliases.
  uint64_t parameter_count() const { return parameter_count_; }
  uint64_t buffer_count() const { return buffer_count_; }
  uint64_t parameter_elements() const { return parameter_elements_; }
  // Bytes of all storages, non-persistent buffers included.
  uint64_t storage_bytes() const { return storage_bytes_; }

 private:
  static constexpr size_t kRecentListings = 16;
  static constexpr size_t kRecentViews = 4;  // larger: specs and a layout

  ModuleSchema() = default;
  const Listing& FullListing(TensorKind kind, ListView view) const {
    return listings_[kind == TensorKind::kBuffer ? 1 : 0][static_cast<size_t>(view)];
  }
  void MakeListings();
  absl::Status UnknownNames(const std::vector<std::string>& unknown) const;

  uint64_t revision_ = 1;
  std::vector<TensorSpec> specs_;
  std::vector<uint32_t> owners_;
  absl::flat_hash_map<absl::string_view, uint32_t> by_name_;  // views into specs_
  std::shared_ptr<const StateView> state_dict_;
  // Do not depend on requires_grad: shared with the schemas that a freeze makes of this one.
  std::array<std::array<Listing, 3>, 2> listings_;  // by kind and view
  std::shared_ptr<SelectionCache<std::vector<uint32_t>>> recent_listings_;
  std::shared_ptr<SelectionCache<StateView>> recent_views_;
  uint64_t parameter_count_ = 0;
  uint64_t buffer_count_ = 0;
  uint64_t parameter_elements_ = 0;
  uint64_t storage_bytes_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_MODULE_SCHEMA_H_
