#ifndef MODELSTATE_SERVER_CHECKPOINT_MANIFEST_TEXT_H_
#define MODELSTATE_SERVER_CHECKPOINT_MANIFEST_TEXT_H_

#include <cstdint>

// What the writer and the reader of a manifest's text share. Internal to the folder.
namespace modelstate {

inline constexpr char kManifestFormat[] = "modelstate checkpoint";
inline constexpr uint64_t kManifestFormatVersion = 1;

// The text ends with the XXH3 of all bytes before this member, so that a changed manifest is told
// from a sound one.
inline constexpr char kManifestTailBegin[] = "\"manifest_xxh3\": \"";
inline constexpr char kManifestTailEnd[] = "\"\n}\n";

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_MANIFEST_TEXT_H_
