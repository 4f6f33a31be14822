#ifndef MODELSTATE_COMMON_WIRE_TRANSPORT_TUNING_H_
#define MODELSTATE_COMMON_WIRE_TRANSPORT_TUNING_H_

#include <grpcpp/support/channel_arguments.h>

#include "common/base/transport_profile.h"

namespace modelstate {

// Has `arguments`, a channel's or a server's, set up each new connection. For a channel, kAuto is
// kWan: see ProfileForTarget.
void SetTransportProfile(TransportProfile profile, grpc::ChannelArguments* arguments);

// A client's profile for `target`, a gRPC target: kAuto becomes kLan for this host, else kWan.
TransportProfile ProfileForTarget(TransportProfile profile, absl::string_view target);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_TRANSPORT_TUNING_H_
