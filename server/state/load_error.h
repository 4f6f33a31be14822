#ifndef MODELSTATE_SERVER_STATE_LOAD_ERROR_H_
#define MODELSTATE_SERVER_STATE_LOAD_ERROR_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/shape.h"
#include "common/base/status.h"
#include "server/state/module_schema.h"

// What load_state_dict says when a state_dict does not fit, in torch's words and order.
namespace modelstate {

// Of one tensor, whatever `strict` is.
struct SizeMismatch {
  Reason reason = Reason::kShapeMismatch;  // or kDTypeMismatch
  std::string name;
  std::string text;
};

// "size mismatch for w: copying a param with shape torch.Size([4, 4]) from checkpoint, the shape in
// current model is torch.Size([2, 3])."
std::string SizeMismatchText(absl::string_view name, const Shape& incoming, const Shape& own);
// What torch says when `assign` would make a Parameter that requires grad of integers.
std::string CannotRequireGradText(absl::string_view name, const Shape& incoming, const Shape& own);

// torch looks for unexpected keys module by module, parents first, and in each in the order of the
// state_dict. Sorts keys that are in that order already so; the modules are those that `schema` has
// tensors in.
void SortByModule(const ModuleSchema& schema, std::vector<std::string>* keys);

// "Error(s) in loading state_dict for MODULE:" with the parts that apply, the missing and
// unexpected keys only when strict: INVALID_ARGUMENT with the reason of the first. At most 1 KiB,
// so of long lists the first names and a count. REQUIRES: something applies.
absl::Status LoadError(absl::string_view module, bool strict, absl::Span<const std::string> missing,
                       absl::Span<const std::string> unexpected,
                       absl::Span<const SizeMismatch> mismatches);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_LOAD_ERROR_H_
