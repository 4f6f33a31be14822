#ifndef MODELSTATE_COMMON_FORMAT_KNOWN_FORMATS_H_
#define MODELSTATE_COMMON_FORMAT_KNOWN_FORMATS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"

// What a file is that is not read, so that people learn what to do with it.
namespace modelstate {

// The first bytes of a file, as many as tell its format; fewer where it is shorter.
absl::StatusOr<std::string> ReadHead(const File& file);

// CHECKPOINT_UNSUPPORTED with what the file is and the way out, by its first bytes; by `name`, the
// path, only where the bytes do not say. OK when they tell nothing.
absl::Status RefuseKnownFormat(absl::string_view name, absl::string_view head);

// The same of a folder, by the names of what is in it.
absl::Status RefuseKnownFolder(absl::Span<const std::string> names);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_KNOWN_FORMATS_H_
