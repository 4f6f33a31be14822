#ifndef MODELSTATE_SERVER_RPC_REFLECTION_H_
#define MODELSTATE_SERVER_RPC_REFLECTION_H_

#include <string>
#include <utility>
#include <vector>

#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "grpc/reflection/v1alpha/reflection.grpc.pb.h"

namespace modelstate {

// Server reflection over the descriptors that are linked in: what grpcurl and its like ask first.
// In place of gRPC 1.51's own, which has v1alpha only and leaves the JSON names of fields out, so
// that what a client prints would depend on the version it speaks. Thread-safe.
template <typename Service, typename Request, typename Response>
class Reflection final : public Service::CallbackService {
 public:
  // Full names of the services that are listed.
  explicit Reflection(std::vector<std::string> services) : services_(std::move(services)) {}

  grpc::ServerBidiReactor<Request, Response>* ServerReflectionInfo(
      grpc::CallbackServerContext* context) override;

 private:
  const std::vector<std::string> services_;
};

using ReflectionV1 = Reflection<grpc::reflection::v1::ServerReflection,
                                grpc::reflection::v1::ServerReflectionRequest,
                                grpc::reflection::v1::ServerReflectionResponse>;
using ReflectionV1Alpha = Reflection<grpc::reflection::v1alpha::ServerReflection,
                                     grpc::reflection::v1alpha::ServerReflectionRequest,
                                     grpc::reflection::v1alpha::ServerReflectionResponse>;

extern template class Reflection<grpc::reflection::v1::ServerReflection,
                                 grpc::reflection::v1::ServerReflectionRequest,
                                 grpc::reflection::v1::ServerReflectionResponse>;
extern template class Reflection<grpc::reflection::v1alpha::ServerReflection,
                                 grpc::reflection::v1alpha::ServerReflectionRequest,
                                 grpc::reflection::v1alpha::ServerReflectionResponse>;

// Makes the linker keep the descriptors of services that gRPC serves without them, so that
// reflection can describe what it lists.
void LinkServiceDescriptors();

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_REFLECTION_H_
