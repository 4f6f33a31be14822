#ifndef MODELSTATE_SERVER_RPC_REFLECTION_V1_H_
#define MODELSTATE_SERVER_RPC_REFLECTION_V1_H_

#include <string>
#include <vector>

#include "grpc/reflection/v1/reflection.grpc.pb.h"

namespace modelstate {

// grpc.reflection.v1 over the descriptors that are linked in (gRPC 1.51 itself has v1alpha only):
// what grpcurl and its like ask first. Thread-safe.
class ReflectionV1 final : public grpc::reflection::v1::ServerReflection::CallbackService {
 public:
  // Full names of the services that are listed.
  explicit ReflectionV1(std::vector<std::string> services) : services_(std::move(services)) {}

  grpc::ServerBidiReactor<grpc::reflection::v1::ServerReflectionRequest,
                          grpc::reflection::v1::ServerReflectionResponse>*
  ServerReflectionInfo(grpc::CallbackServerContext* context) override;

 private:
  const std::vector<std::string> services_;
};

// Makes the linker keep the descriptors of services that gRPC serves without them, so that both
// versions of reflection can describe what they list.
void LinkServiceDescriptors();

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_REFLECTION_V1_H_
