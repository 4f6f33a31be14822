#ifndef MODELSTATE_CLIENT_MODULE_SPEC_PROTO_H_
#define MODELSTATE_CLIENT_MODULE_SPEC_PROTO_H_

#include "absl/status/statusor.h"
#include "client/module_types.h"
#include "modelstate/v1/module.pb.h"

// ModuleSpec <-> the wire's message. Internal to the library.
namespace modelstate::client {

// INVALID_FIELD and UNKNOWN_KEY where a tensor is malformed, as the server would say it.
absl::StatusOr<ModuleSpec> FromProto(const v1::ModuleSpec& proto);
void ToProto(const Registration& value, v1::TensorInfo* proto);
void ToProto(const ModuleSpec& value, v1::ModuleSpec* proto);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_MODULE_SPEC_PROTO_H_
