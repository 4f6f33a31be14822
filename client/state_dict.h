#ifndef MODELSTATE_CLIENT_STATE_DICT_H_
#define MODELSTATE_CLIENT_STATE_DICT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/tensor_spec.h"

namespace modelstate::client {

// One version of a module's state_dict, or of a selection of it, in memory: tensors in state_dict
// order, then optimizer state where it was asked for, over one contiguous buffer, laid out as the
// data region of a safetensors file. Move-only; thread-compatible. Spans stay valid as long as the
// object that it was moved to last.
class StateDict {
 public:
  StateDict() = default;
  StateDict(StateDict&&) noexcept = default;
  StateDict& operator=(StateDict&&) noexcept = default;

  size_t size() const { return specs_.size(); }
  absl::Span<const TensorSpec> specs() const { return specs_; }
  // Elements of tensor `index`, row-major and little-endian; of a tied tensor its owner's.
  absl::Span<const uint8_t> bytes(size_t index) const {
    return absl::MakeConstSpan(data_.get() + offsets_[index], specs_[index].nbytes());
  }
  // `slot`: of optimizer state, which a fetch brings where it was asked for.
  std::optional<size_t> Find(absl::string_view name, absl::string_view slot = "") const;

  // The whole data region.
  absl::Span<const uint8_t> data() const { return absl::MakeConstSpan(data_.get(), total_bytes_); }
  uint64_t offset(size_t index) const { return offsets_[index]; }

  const std::string& module() const { return module_; }
  Version version() const { return version_; }
  uint64_t step() const { return step_; }
  const std::string& layout_digest() const { return layout_digest_; }
  // The version that the caller has already is the current one: nothing else was set.
  bool not_modified() const { return not_modified_; }
  uint64_t verified_digests() const { return verified_digests_; }

 private:
  friend class StateDictBuilder;
  friend class Follower;

  // Takes over the tensors of `delta`, which are among these, and its version: their indices.
  absl::StatusOr<std::vector<size_t>> Update(const StateDict& delta);

  std::vector<TensorSpec> specs_;
  std::vector<uint64_t> offsets_;
  // By name and slot, which are views into specs_.
  absl::flat_hash_map<std::pair<absl::string_view, absl::string_view>, size_t> index_of_name_;
  std::unique_ptr<uint8_t[]> data_;
  uint64_t capacity_ = 0;  // bytes at data_
  uint64_t total_bytes_ = 0;
  std::string module_;
  Version version_;
  uint64_t step_ = 0;
  std::string layout_digest_;
  bool not_modified_ = false;
  uint64_t verified_digests_ = 0;
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_STATE_DICT_H_
