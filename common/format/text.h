#ifndef MODELSTATE_COMMON_FORMAT_TEXT_H_
#define MODELSTATE_COMMON_FORMAT_TEXT_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

// What the readers and writers of this folder, and who opens files for them, share about names.
namespace modelstate {

// Well-formed UTF-8: no surrogates, no overlong forms, nothing above U+10FFFF.
bool IsValidUtf8(absl::string_view text);

// A name in quotes as a message may show it: escaped, cut to 120 bytes.
std::string ShowName(absl::string_view name);

// What is wrong with `name` as a tensor name ("is empty", "has a NUL", ...); empty: nothing.
absl::string_view TensorNameProblem(absl::string_view name);

// DATA_LOSS CHECKPOINT_CORRUPT; `text` says what contradicts what.
absl::Status Corrupt(absl::string_view text);

// INVALID_ARGUMENT CHECKPOINT_UNSUPPORTED; `text` says what to do instead.
absl::Status Unsupported(absl::string_view text);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TEXT_H_
