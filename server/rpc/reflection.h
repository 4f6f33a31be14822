#ifndef MODELSTATE_SERVER_RPC_REFLECTION_H_
#define MODELSTATE_SERVER_RPC_REFLECTION_H_

#include <string>
#include <vector>

#include "server/rpc/call.h"

namespace modelstate {

// Server reflection, v1 and v1alpha, over the descriptors that are linked in: what grpcurl and its
// like ask first. gRPC 1.51's own has v1alpha only and leaves the JSON names of fields out, so that
// what a client prints would depend on the version it speaks. `services`: full names of those that
// are listed.
std::vector<Call::Method> ReflectionMethods(std::vector<std::string> services);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_REFLECTION_H_
