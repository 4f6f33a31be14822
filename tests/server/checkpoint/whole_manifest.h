#ifndef MODELSTATE_TESTS_SERVER_CHECKPOINT_WHOLE_MANIFEST_H_
#define MODELSTATE_TESTS_SERVER_CHECKPOINT_WHOLE_MANIFEST_H_

#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "common/base/status.h"
#include "server/checkpoint/manifest.h"

namespace modelstate {

// All that a manifest says, lists included, as it was written.
inline absl::StatusOr<Manifest> ParseWholeManifest(std::string text) {
  MS_ASSIGN_OR_RETURN(const StoredManifest stored, StoredManifest::Parse(std::move(text)));
  Manifest manifest{stored.head(), {}, {}, {}, {}};
  MS_RETURN_IF_ERROR(stored.ForEachTensor([&manifest](Manifest::TensorEntry entry) {
    manifest.tensors.push_back(std::move(entry));
    return absl::OkStatus();
  }));
  MS_RETURN_IF_ERROR(stored.ForEachParameter([&manifest](Manifest::ParameterEntry entry) {
    manifest.optimizer_state.push_back(std::move(entry));
    return absl::OkStatus();
  }));
  MS_ASSIGN_OR_RETURN(manifest.optimizer, stored.Optimizer());
  MS_ASSIGN_OR_RETURN(manifest.workers, stored.Workers());
  return manifest;
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_CHECKPOINT_WHOLE_MANIFEST_H_
