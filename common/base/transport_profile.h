#ifndef MODELSTATE_COMMON_BASE_TRANSPORT_PROFILE_H_
#define MODELSTATE_COMMON_BASE_TRANSPORT_PROFILE_H_

#include <optional>

#include "absl/strings/string_view.h"

namespace modelstate {

// How sockets are set up for moving tensors. What the host does not allow is left as it is.
enum class TransportProfile {
  // kLan for what is near, else kWan. A server goes by the round trip of each connection's
  // handshake (under 2 ms); a client, which sets its sockets up before it connects, by the target:
  // this host is near.
  kAuto,
  // Loopback and local networks: a receive buffer of 1 MiB (SO_RCVBUF, which turns the kernel's own
  // tuning off and would bound a far connection to 1 MiB a round trip), and the congestion control
  // reno where the host's own paces what it sends (bbr).
  kLan,
  kWan,  // as the host does it
};

// "auto", "lan" or "wan".
inline std::optional<TransportProfile> ParseTransportProfile(absl::string_view text) {
  if (text == "auto") return TransportProfile::kAuto;
  if (text == "lan") return TransportProfile::kLan;
  if (text == "wan") return TransportProfile::kWan;
  return std::nullopt;
}

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_TRANSPORT_PROFILE_H_
