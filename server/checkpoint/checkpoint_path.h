#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_PATH_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_PATH_H_

#include <cstdint>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/checkpoint_names.h"
#include "common/base/digest.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/checkpoint/manifest.h"

// What the sources of CheckpointStore share. Internal to the folder.
namespace modelstate {

// How deep below the root checkpoints are looked for.
inline constexpr int kMaxScanDepth = 16;

inline std::string TemporaryPath(const std::string& path, uint64_t random) {
  return absl::StrCat(path, kTemporaryMark, DigestToHex(random));
}

// `step-00000040-of-0123456789abcdef`: what another life of the module has saved there.
inline std::string AsidePath(const std::string& path, uint64_t incarnation) {
  return absl::StrCat(path, "-of-", DigestToHex(incarnation));
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

// `path`, locked against other servers with the same root. CHECKPOINT_EXISTS where one has it.
absl::StatusOr<RootDirectory> HoldDirectory(const RootDirectory& root, const std::string& path);
// Removes the parts of a saved directory and then it: what no save made stays, and it with that.
absl::Status RemoveParts(const RootDirectory& root, const std::string& directory);

// Of the `entries` of `directory`, which has no manifest, the names of those that are the
// checkpoint that the directory itself is, and those of sharded ones in it.
std::set<std::string> FindParts(const RootDirectory& root, const std::string& directory,
                                absl::Span<const RootDirectory::Entry> entries);

// All but `tensor_count` and `has_optimizer`.
CheckpointInfo DescribeManifest(const ManifestHead& head, uint64_t manifest_bytes,
                                const std::string& path);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_PATH_H_
