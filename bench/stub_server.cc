// The baseline of transfer_bench: the same service with generated stubs, with the
// malloc and sockets of modelstate-server. It holds the payload that
// the flags describe and says "listening on HOST:PORT".
//
//   build/release/bin/stub_server --bytes=1073741824 | --tensors=200 --tensor_bytes=1024

#include <grpcpp/grpcpp.h>

#include <cstdio>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/stub_transfer.h"
#include "common/base/tune_malloc.h"
#include "common/wire/transport_tuning.h"

ABSL_FLAG(uint64_t, bytes, uint64_t{1} << 30, "mixed tensors, so many bytes in all");
ABSL_FLAG(uint64_t, tensors, 0, "in place of mixed tensors, so many of --tensor_bytes");
ABSL_FLAG(uint64_t, tensor_bytes, 1024, "bytes of each of --tensors");

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  const uint64_t tensors = absl::GetFlag(FLAGS_tensors);
  const modelstate::Payload payload(
      tensors > 0 ? modelstate::EqualTensors(tensors, absl::GetFlag(FLAGS_tensor_bytes))
                  : modelstate::MixedTensors(absl::GetFlag(FLAGS_bytes)));
  modelstate::StubService service(&payload);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  modelstate::SetTransportProfile(modelstate::TransportProfile::kLan, &builder);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::printf("listening on 127.0.0.1:%d\n", port);
  std::fflush(stdout);
  server->Wait();
  return 0;
}
