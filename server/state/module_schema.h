#ifndef MODELSTATE_SERVER_STATE_MODULE_SCHEMA_H_
#define MODELSTATE_SERVER_STATE_MODULE_SCHEMA_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/selection.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"

namespace modelstate {

// Part of a module's tensors with the layout of their data region. Immutable.
struct StateView {
  std::vector<uint32_t> indices;  // into the schema, ascending
  std::vector<TensorSpec> specs;  // of those; dtype as read (after float_dtype)
  StateLayout layout;             // of `specs`
};

// The names, kinds, dtypes and shapes of a module, in state_dict order: everything but the
// elements. Immutable; shared by all versions until one of them changes it.
class ModuleSchema {
 public:
  // Checks what torch's register_parameter and register_buffer check, for dotted names:
  // INVALID_FIELD for an empty or taken name, a kind other than parameter or buffer, a parameter
  // whose dtype cannot require grad while requires_grad is true; UNKNOWN_KEY for an alias whose
  // owner is not an earlier tensor of the same kind, dtype and shape. Sums of sizes are checked for
  // overflow.
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

  // The part that `selection` selects; the cached state_dict() when that is everything.
  // NOT_FOUND TENSOR_NOT_FOUND for a name that no tensor has.
  absl::StatusOr<std::shared_ptr<const StateView>> View(const Selection& selection) const;

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
  ModuleSchema() = default;

  uint64_t revision_ = 1;
  std::vector<TensorSpec> specs_;
  std::vector<uint32_t> owners_;
  absl::flat_hash_map<absl::string_view, uint32_t> by_name_;  // views into specs_
  std::shared_ptr<const StateView> state_dict_;
  uint64_t parameter_count_ = 0;
  uint64_t buffer_count_ = 0;
  uint64_t parameter_elements_ = 0;
  uint64_t storage_bytes_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_MODULE_SCHEMA_H_
