#include "common/wire/transport_tuning.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace modelstate {
namespace {

int ReceiveBuffer(int fd) {
  int bytes = 0;
  socklen_t length = sizeof(bytes);
  EXPECT_EQ(getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, &length), 0);
  return bytes;
}

std::string Congestion(int fd) {
  char name[16] = "";
  socklen_t length = sizeof(name);
  getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length);
  return name;
}

// What the host makes of the request for 1 MiB; it may allow less.
int TunedReceiveBuffer() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const int wanted = 1 << 20;
  setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &wanted, sizeof(wanted));
  const int bytes = ReceiveBuffer(fd);
  close(fd);
  return bytes;
}

// A server and a channel in this process, and the two sockets between them.
class Pair {
 public:
  Pair(TransportProfile server_profile, TransportProfile channel_profile) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    SetTransportProfile(server_profile, &builder);
    builder.RegisterAsyncGenericService(&service_);
    queue_ = builder.AddCompletionQueue();
    server_ = builder.BuildAndStart();
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    SetTransportProfile(channel_profile, &arguments);
    channel_ = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port),
                                         grpc::InsecureChannelCredentials(), arguments);
    EXPECT_TRUE(
        channel_->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(10)));
    for (int fd = 3; fd < 1024; ++fd) {
      sockaddr_in local{}, peer{};
      socklen_t length = sizeof(peer);
      if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0) continue;
      length = sizeof(local);
      if (getsockname(fd, reinterpret_cast<sockaddr*>(&local), &length) != 0) continue;
      if (ntohs(local.sin_port) == port) server_fd = fd;
      if (ntohs(peer.sin_port) == port) channel_fd = fd;
    }
    EXPECT_GE(server_fd, 0);
    EXPECT_GE(channel_fd, 0);
  }
  ~Pair() {
    server_->Shutdown(std::chrono::system_clock::now());
    queue_->Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_->Next(&tag, &ok)) {
    }
  }

  int server_fd = -1;
  int channel_fd = -1;

 private:
  grpc::AsyncGenericService service_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST(TransportTuningTest, LanSetsTheReceiveBufferOfBothEndsAndTurnsPacingOff) {
  const Pair pair(TransportProfile::kLan, TransportProfile::kLan);
  for (int fd : {pair.server_fd, pair.channel_fd}) {
    EXPECT_EQ(ReceiveBuffer(fd), TunedReceiveBuffer());
    EXPECT_NE(Congestion(fd).substr(0, 3), "bbr");
  }
}

TEST(TransportTuningTest, WanLeavesSocketsAsTheHostSetsThemUp) {
  const Pair pair(TransportProfile::kWan, TransportProfile::kWan);
  EXPECT_NE(ReceiveBuffer(pair.server_fd), TunedReceiveBuffer());
  EXPECT_NE(ReceiveBuffer(pair.channel_fd), TunedReceiveBuffer());
}

TEST(TransportTuningTest, AutoTakesLoopbackForNearOnTheServer) {
  const Pair pair(TransportProfile::kAuto, TransportProfile::kAuto);
  EXPECT_EQ(ReceiveBuffer(pair.server_fd), TunedReceiveBuffer());
  EXPECT_NE(ReceiveBuffer(pair.channel_fd), TunedReceiveBuffer());
}

TEST(TransportTuningTest, AClientGoesByItsTarget) {
  const std::map<std::string, TransportProfile> cases = {
      {"localhost:50051", TransportProfile::kLan},      {"127.0.0.1:1", TransportProfile::kLan},
      {"ipv4:127.0.0.1:1", TransportProfile::kLan},     {"[::1]:50051", TransportProfile::kLan},
      {"dns:///localhost:1", TransportProfile::kLan},   {"unix:/run/x", TransportProfile::kLan},
      {"models.example:50051", TransportProfile::kWan}, {"10.0.0.7:1", TransportProfile::kWan},
      {"localhost.example:1", TransportProfile::kWan}};
  for (const auto& [target, profile] : cases) {
    EXPECT_EQ(ProfileForTarget(TransportProfile::kAuto, target), profile) << target;
    EXPECT_EQ(ProfileForTarget(TransportProfile::kWan, target), TransportProfile::kWan) << target;
  }
}

}  // namespace
}  // namespace modelstate
