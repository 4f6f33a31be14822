#ifndef MODELSTATE_BENCH_STUB_TRANSFER_H_
#define MODELSTATE_BENCH_STUB_TRANSFER_H_

#include <string>

#include "absl/types/span.h"
#include "bench/payload.h"
#include "modelstate/v1/service.grpc.pb.h"

// The service as it is usually written: generated stubs, messages with `bytes` fields.
namespace modelstate {

// Sends `payload` for any module, and lists it, building each message when it is asked for.
class StubService final : public v1::ModelState::Service {
 public:
  explicit StubService(const Payload* payload) : payload_(*payload) {}

  grpc::Status StreamStateDict(grpc::ServerContext* context,
                               const v1::StreamStateDictRequest* request,
                               grpc::ServerWriter<v1::StatePart>* writer) override;
  grpc::Status ListParameters(grpc::ServerContext* context, const v1::ListTensorsRequest* request,
                              v1::ListTensorsResponse* response) override;

 private:
  void Describe(size_t index, uint64_t offset, v1::TensorInfo* info) const;

  const Payload& payload_;
};

// Fetches from any server with stubs into `destination`. Ends the program on an error.
void StubFetch(v1::ModelState::Stub& stub, const std::string& module,
               absl::Span<uint8_t> destination);

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_STUB_TRANSFER_H_
