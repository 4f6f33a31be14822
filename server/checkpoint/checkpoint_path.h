#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_PATH_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_PATH_H_

#include <cstdint>
#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/digest.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/checkpoint/manifest.h"

// What the sources of CheckpointStore share. Internal to the folder.
namespace modelstate {

// As the last part of a path: the newest checkpoint in the directory before it.
inline constexpr char kLatestName[] = "latest";

// How deep below the root checkpoints are looked for.
inline constexpr int kMaxScanDepth = 16;

// A save is made in `<name>.tmp-<16 hex digits>` beside its place.
inline constexpr char kTemporaryMark[] = ".tmp-";
inline constexpr size_t kTemporarySuffixBytes = sizeof(kTemporaryMark) - 1 + 16;

inline std::string TemporaryPath(const std::string& path, uint64_t random) {
  return absl::StrCat(path, kTemporaryMark, DigestToHex(random));
}

inline bool IsTemporaryName(absl::string_view name) {
  if (name.size() <= kTemporarySuffixBytes) return false;
  const absl::string_view suffix = name.substr(name.size() - kTemporarySuffixBytes);
  return absl::StartsWith(suffix, kTemporaryMark) &&
         DigestFromHex(suffix.substr(sizeof(kTemporaryMark) - 1)).has_value();
}

// "." for a path of one part.
inline std::string ParentPath(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

inline absl::string_view LastPart(absl::string_view path) {
  const size_t slash = path.rfind('/');
  return slash == absl::string_view::npos ? path : path.substr(slash + 1);
}

inline std::string JoinPath(const std::string& directory, absl::string_view name) {
  return directory == "." ? std::string(name) : absl::StrCat(directory, "/", name);
}

// Whether a directory has nothing but what a save, or a deletion that was cut off, leaves.
bool HoldsOnlyParts(const RootDirectory& directory);
// CHECKPOINT_UNSUPPORTED with the first other entry, which a deletion of `path` would take along.
absl::Status CheckHoldsOnlyParts(const RootDirectory& root, const std::string& path);

// Of the `entries` of `directory`, which has no manifest, the names of those that are the
// checkpoint that the directory itself is.
std::set<std::string> FindParts(const RootDirectory& root, const std::string& directory,
                                absl::Span<const RootDirectory::Entry> entries);

// All but `tensor_count` and `has_optimizer`.
CheckpointInfo DescribeManifest(const ManifestHead& head, uint64_t manifest_bytes,
                                const std::string& path);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_PATH_H_
