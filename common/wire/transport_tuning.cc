#include "common/wire/transport_tuning.h"

#include <grpc/support/sync.h>
#include <grpcpp/impl/server_builder_option.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <array>
#include <memory>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"

// gRPC's hook for sockets is in its library and its ChannelArguments, but not in its public headers
// (src/core/lib/iomgr/socket_mutator.h of 1.51). TransportTuningTest looks at the sockets, and so
// finds another layout.
enum grpc_fd_usage {
  GRPC_FD_CLIENT_CONNECTION_USAGE,
  GRPC_FD_SERVER_LISTENER_USAGE,
  GRPC_FD_SERVER_CONNECTION_USAGE,
};
struct grpc_mutate_socket_info {
  int fd;
  grpc_fd_usage usage;
};
struct grpc_socket_mutator_vtable {
  bool (*mutate_fd)(int fd, grpc_socket_mutator* mutator);
  int (*compare)(grpc_socket_mutator* a, grpc_socket_mutator* b);
  void (*destroy)(grpc_socket_mutator* mutator);
  bool (*mutate_fd_2)(const grpc_mutate_socket_info* info, grpc_socket_mutator* mutator);
};
struct grpc_socket_mutator {
  const grpc_socket_mutator_vtable* vtable;
  gpr_refcount refcount;
};
void grpc_socket_mutator_init(grpc_socket_mutator* mutator,
                              const grpc_socket_mutator_vtable* vtable);

namespace modelstate {
namespace {

constexpr int kReceiveBufferBytes = 1 << 20;
constexpr uint32_t kNearMicroseconds = 2000;

struct SocketTuner : grpc_socket_mutator {
  TransportProfile profile;
};

bool IsNear(int fd) {
  tcp_info info{};
  socklen_t length = sizeof(info);
  return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_rtt > 0 &&
         info.tcpi_rtt < kNearMicroseconds;
}

// Best effort: a socket that stays as it is works too.
void TuneForLan(int fd) {
  setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &kReceiveBufferBytes, sizeof(kReceiveBufferBytes));
  std::array<char, 16> congestion{};
  socklen_t length = congestion.size();
  if (getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion.data(), &length) == 0 &&
      absl::StartsWith(congestion.data(), "bbr")) {
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
  }
}

bool Tune(const grpc_mutate_socket_info* info, grpc_socket_mutator* mutator) {
  const TransportProfile profile = static_cast<SocketTuner*>(mutator)->profile;
  const bool met = info->usage == GRPC_FD_SERVER_CONNECTION_USAGE;
  const bool listens = info->usage == GRPC_FD_SERVER_LISTENER_USAGE;
  if (!listens && (profile == TransportProfile::kLan ||
                   (profile == TransportProfile::kAuto && met && IsNear(info->fd)))) {
    TuneForLan(info->fd);
  }
  return true;  // false would refuse the connection
}

int Compare(grpc_socket_mutator* a, grpc_socket_mutator* b) {
  return static_cast<int>(static_cast<SocketTuner*>(a)->profile) -
         static_cast<int>(static_cast<SocketTuner*>(b)->profile);
}

void Destroy(grpc_socket_mutator* mutator) { delete static_cast<SocketTuner*>(mutator); }

constexpr grpc_socket_mutator_vtable kTunerTable = {nullptr, Compare, Destroy, Tune};

class ProfileOption final : public grpc::ServerBuilderOption {
 public:
  explicit ProfileOption(TransportProfile profile) : profile_(profile) {}
  void UpdateArguments(grpc::ChannelArguments* arguments) override {
    SetTransportProfile(profile_, arguments);
  }
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>*) override {}

 private:
  const TransportProfile profile_;
};

}  // namespace

void SetTransportProfile(TransportProfile profile, grpc::ChannelArguments* arguments) {
  auto* tuner = new SocketTuner;
  tuner->profile = profile;
  grpc_socket_mutator_init(tuner, &kTunerTable);
  arguments->SetSocketMutator(tuner);
}

void SetTransportProfile(TransportProfile profile, grpc::ServerBuilder* builder) {
  builder->SetOption(std::make_unique<ProfileOption>(profile));
}

TransportProfile ProfileForTarget(TransportProfile profile, absl::string_view target) {
  if (profile != TransportProfile::kAuto) return profile;
  for (absl::string_view scheme : {"dns:", "ipv4:", "ipv6:", "///"}) {
    absl::ConsumePrefix(&target, scheme);
  }
  for (absl::string_view here : {"localhost:", "127.", "[::1]", "::1", "unix:"}) {
    if (absl::StartsWith(target, here)) return TransportProfile::kLan;
  }
  return TransportProfile::kWan;
}

}  // namespace modelstate
