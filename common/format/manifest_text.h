#ifndef MODELSTATE_COMMON_FORMAT_MANIFEST_TEXT_H_
#define MODELSTATE_COMMON_FORMAT_MANIFEST_TEXT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/checkpoint_names.h"
#include "common/base/file.h"
#include "common/format/json_view.h"

// What `manifest.json` of a saved directory says of itself and of its files, for who checks them
// without a server. The rest of it is the server's: server/checkpoint/manifest.h.
namespace modelstate {

inline constexpr uint64_t kMaxManifestBytes = uint64_t{1} << 28;

inline constexpr char kManifestFormat[] = "modelstate checkpoint";
inline constexpr uint64_t kManifestFormatVersion = 2;
// The oldest that is read. It has no digests of headers.
inline constexpr uint64_t kOldestManifestFormatVersion = 1;

// The text ends with the XXH3 of all bytes before this member, so that a changed manifest is told
// from a sound one.
inline constexpr char kManifestTailBegin[] = "\"manifest_xxh3\": \"";
inline constexpr char kManifestTailEnd[] = "\"\n}\n";

// Whether the text is as it was written. DATA_LOSS CHECKPOINT_CORRUPT, DIGEST_MISMATCH.
absl::Status CheckManifestDigest(absl::string_view text);

struct ManifestFile {
  std::string name;
  uint64_t nbytes = 0;
  // Of the bytes before the elements. They hold the digests of those, so that this is a digest of
  // all; nullopt where the manifest is of format 1.
  std::optional<uint64_t> header_xxh3;
};

// All of the file. DATA_LOSS CHECKPOINT_CORRUPT where it is larger than a manifest may be.
absl::StatusOr<std::string> ReadManifestText(const File& file);

// What the member "files" of a manifest lists: the model file, and maybe the optimizer file.
absl::StatusOr<std::vector<ManifestFile>> ManifestFiles(JsonView list);

// Whether `file` has the size and the header that the manifest records. DATA_LOSS
// CHECKPOINT_CORRUPT, DIGEST_MISMATCH.
absl::Status CheckManifestFile(const File& file, const ManifestFile& entry);

// Reads the folder's manifest and the headers of its files, and compares sizes and digests. Returns
// the files. DATA_LOSS CHECKPOINT_CORRUPT, DIGEST_MISMATCH.
absl::StatusOr<std::vector<ManifestFile>> CheckManifestFiles(const std::string& folder);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_MANIFEST_TEXT_H_
