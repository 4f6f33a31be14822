#ifndef MODELSTATE_COMMON_WIRE_TRANSPORT_TUNING_H_
#define MODELSTATE_COMMON_WIRE_TRANSPORT_TUNING_H_

#include <grpcpp/server_builder.h>
#include <grpcpp/support/channel_arguments.h>

#include "common/base/transport_profile.h"

namespace modelstate {

// Has a channel with these arguments set up each new connection; kAuto is kWan: see
// ProfileForTarget.
void SetTransportProfile(TransportProfile profile, grpc::ChannelArguments* arguments);

// The same for each connection that a server takes; kAuto goes by how far away its peer is.
void SetTransportProfile(TransportProfile profile, grpc::ServerBuilder* builder);

// A client's profile for `target`, a gRPC target: kAuto becomes kLan for this host, else kWan.
TransportProfile ProfileForTarget(TransportProfile profile, absl::string_view target);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_TRANSPORT_TUNING_H_
