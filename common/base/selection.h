#ifndef MODELSTATE_COMMON_BASE_SELECTION_H_
#define MODELSTATE_COMMON_BASE_SELECTION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/tensor_spec.h"

namespace modelstate {

// Whether `name` matches a shell pattern: `*` is any run of characters (dots too), `?` is one,
// `[abc]` and `[!a-z]` are sets, as in Python's fnmatch. Linear in pattern times name; adds to
// `steps`, unless null, about how many characters it looked at.
bool GlobMatch(absl::string_view pattern, absl::string_view name, uint64_t* steps = nullptr);

// Which tensors of a module a call is about. A tensor is selected when it has one of the names,
// prefixes or globs (any, when all three are empty) and one of the kinds (any, when empty).
// Value type, thread-compatible.
struct Selection {
  std::vector<std::string> names;
  std::vector<std::string> prefixes;
  std::vector<std::string> globs;
  std::vector<TensorKind> kinds;
  // Read floating-point tensors in this dtype instead of their own.
  std::optional<DType> float_dtype;
  // Non-persistent buffers are not in a state_dict and come only on request.
  bool include_non_persistent = false;

  bool everything() const {
    return names.empty() && prefixes.empty() && globs.empty() && kinds.empty() && !float_dtype;
  }
};

// Whether `name` has one of the prefixes or globs, or the selection names nothing at all. `steps`
// as above.
bool MatchesPattern(const Selection& selection, absl::string_view name, uint64_t* steps = nullptr);

// Indices of the selected tensors, ascending. UNKNOWN_KEY or TENSOR_NOT_FOUND is the caller's
// choice, so a name that no tensor has is returned in `unknown` (not null).
std::vector<uint32_t> Select(const Selection& selection, absl::Span<const TensorSpec> specs,
                             std::vector<std::string>* unknown);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_SELECTION_H_
