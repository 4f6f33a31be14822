#ifndef MODELSTATE_COMMON_BASE_CHECKPOINT_NAMES_H_
#define MODELSTATE_COMMON_BASE_CHECKPOINT_NAMES_H_

#include <cstddef>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "common/base/digest.h"

// The names that have a meaning below a checkpoint root. docs/checkpoints.md specifies them.
namespace modelstate {

// All that a saved directory has.
inline constexpr char kManifestFile[] = "manifest.json";
inline constexpr char kModelFile[] = "model.safetensors";
inline constexpr char kOptimizerFile[] = "optimizer.safetensors";
inline bool IsSavedFileName(absl::string_view name) {
  return name == kManifestFile || name == kModelFile || name == kOptimizerFile;
}

// As the last part of a path: the newest checkpoint in the directory before it.
inline constexpr char kLatestName[] = "latest";

// A save is made in `<name>.tmp-<16 hex digits>` beside its place.
inline constexpr char kTemporaryMark[] = ".tmp-";
inline constexpr size_t kTemporarySuffixBytes = sizeof(kTemporaryMark) - 1 + 16;

inline bool IsTemporaryName(absl::string_view name) {
  if (name.size() <= kTemporarySuffixBytes) return false;
  const absl::string_view suffix = name.substr(name.size() - kTemporarySuffixBytes);
  return absl::StartsWith(suffix, kTemporaryMark) &&
         DigestFromHex(suffix.substr(sizeof(kTemporaryMark) - 1)).has_value();
}

// Why no part of a checkpoint's path, and so of a module's name, may be `part`: "has a part ...";
// empty: it may.
inline absl::string_view PathPartProblem(absl::string_view part) {
  if (IsTemporaryName(part)) {
    return "has a part with the name of a temporary, which a start of the server removes";
  }
  if (part == kLatestName) {
    return "has a part with the name by which loads find the newest checkpoint";
  }
  if (IsSavedFileName(part)) return "has a part with the name of a checkpoint's file";
  return "";
}

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_CHECKPOINT_NAMES_H_
