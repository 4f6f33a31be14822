#ifndef MODELSTATE_SERVER_STATE_REGISTRATION_H_
#define MODELSTATE_SERVER_STATE_REGISTRATION_H_

#include <cstdint>
#include <string>

#include "absl/container/btree_set.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/base/tensor_spec.h"
#include "server/state/module_version.h"

namespace modelstate {

// What torch.nn.Module checks when a module is put together by register_parameter, register_buffer
// and add_module, for full dotted names: "conv1.weight" registers "weight" on the child "conv1".
// The errors are INVALID_FIELD, in torch's words, with the full name and the way out.
//
// For modules that are made from a spec, or by a load whose table has initializers. A file that is
// loaded into an empty module brings the names that it has: torch's own rules for a state_dict are
// none.
//
// Thread-compatible; names are borrowed until the Registrar ends.
class Registrar {
 public:
  // The next tensor. Refused: an empty name or an empty part of one; a name that is taken, by a
  // tensor or by the child module of an earlier name, and the reverse.
  absl::Status AddName(absl::string_view name, TensorKind kind);

 private:
  // By bytes, but a dot before all others.
  struct DotFirst {
    bool operator()(absl::string_view a, absl::string_view b) const;
  };
  absl::btree_set<absl::string_view, DotFirst> names_;
};

// Only floating-point and complex parameters can require gradients.
absl::Status CheckRequiresGrad(const TensorSpec& spec);

// The free text of a module: at most kMaxMetadataEntries, of kMaxMetadataBytes together (keys and
// values).
inline constexpr size_t kMaxMetadataEntries = 1000;
inline constexpr size_t kMaxMetadataBytes = size_t{256} << 10;
absl::Status CheckMetadata(const ModuleMetadata& metadata);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_STATE_REGISTRATION_H_
