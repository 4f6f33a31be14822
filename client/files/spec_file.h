#ifndef MODELSTATE_CLIENT_FILES_SPEC_FILE_H_
#define MODELSTATE_CLIENT_FILES_SPEC_FILE_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/module_types.h"

namespace modelstate::client {

// A module's spec as text: modelstate.v1.ModuleSpec in protobuf's JSON or text format.
enum class SpecFormat { kJson, kTextProto };

// By the extension (.json; .textproto, .txtpb, .pbtxt, .prototxt), else by the text: JSON begins
// with a brace.
SpecFormat GuessSpecFormat(absl::string_view path, absl::string_view text);

// INVALID_FIELD that names `path`, and the line and column or the field.
absl::StatusOr<ModuleSpec> ParseModuleSpec(absl::string_view text, SpecFormat format,
                                           absl::string_view path);

// A tensor a line in JSON.
std::string FormatModuleSpec(const ModuleSpec& spec, SpecFormat format);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_SPEC_FILE_H_
