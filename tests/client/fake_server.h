#ifndef MODELSTATE_TESTS_CLIENT_FAKE_SERVER_H_
#define MODELSTATE_TESTS_CLIENT_FAKE_SERVER_H_

#include <grpcpp/server.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "client/client.h"
#include "common/base/state_layout.h"
#include "common/base/status.h"
#include "modelstate/v1/service.grpc.pb.h"
#include "tests/client/fake_module_calls.h"

namespace modelstate {

// A server of one module "m" that speaks plain protobuf and can be told to misbehave. Its knobs are
// set between calls.
class FakeServer final : public FakeModuleCalls {
 public:
  // `port` 0: a free one.
  explicit FakeServer(int port = 0);
  ~FakeServer() override { server_->Shutdown(std::chrono::system_clock::now()); }

  int port() const { return port_; }
  Client Connect() const { return Connect(absl::StrCat("localhost:", port_)); }
  static Client Connect(const std::string& target);

  // Two slots of a parameter follow the state_dict; streams and pins must ask for them.
  void AddOptimizerState();
  // One tensor, so large that streams side by side divide it.
  void AddLargeTensor(uint64_t size);

  absl::Span<const uint8_t> bytes(size_t index) const {
    const ByteRange range = layout.range(index);
    return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(region.data()), region.size())
        .subspan(range.begin, range.size());
  }

  StateLayout layout;
  std::string region;
  uint64_t incarnation = 77;
  uint64_t version = 5;
  bool has_optimizer_state = false;
  bool pinned_optimizer_state = false;

  // Each stream of the list ends with UNAVAILABLE after so many bytes; later ones are whole.
  std::vector<uint64_t> break_after;
  bool no_trailer = false;
  bool wrong_digest = false;
  size_t refuse_streams_from = SIZE_MAX;
  std::atomic<size_t> streams = 0;
  std::atomic<size_t> refused_pins = 0;  // streams of pins that are not held
  std::atomic<uint64_t> sent_bytes = 0;
  uint64_t chunk_bytes = 5000;
  std::string held = "pin-1";  // the snapshot that is held
  int pins = 0;
  int pin_calls = 0;  // renewals too
  bool refuse_pins = false;
  std::function<void()> on_renewal;  // before its answer
  std::string stream_snapshot_id;
  int releases = 0;

  uint64_t max_chunk_bytes = uint64_t{2} << 20;
  // The next streams and steps are refused with these, each with one.
  std::vector<Reason> refusals;
  int fail_steps = 0;  // the next so many ApplyStep calls end with UNAVAILABLE after the trailer
  bool forgets_steps = false;  // a header alone is of a step that was never seen
  std::vector<v1::StepHeader> step_headers;
  std::string step_bytes;
  std::vector<std::string> step_names;

 private:
  using Context = grpc::ServerContext;

  absl::Status NextRefusal();
  grpc::Status GetModule(Context*, const v1::GetModuleRequest* request,
                         v1::Module* response) override;

  void List(TensorKind kind, const v1::ListTensorsRequest& request,
            v1::ListTensorsResponse* response);
  grpc::Status ListParameters(Context*, const v1::ListTensorsRequest* request,
                              v1::ListTensorsResponse* response) override;
  grpc::Status ListBuffers(Context*, const v1::ListTensorsRequest* request,
                           v1::ListTensorsResponse* response) override;
  grpc::Status ListOptimizerState(Context* context, const v1::ListTensorsRequest* request,
                                  v1::ListTensorsResponse* response) override;
  grpc::Status PinSnapshot(Context*, const v1::PinSnapshotRequest* request,
                           v1::Snapshot* response) override;
  grpc::Status ReleaseSnapshot(Context*, const v1::ReleaseSnapshotRequest*,
                               v1::ReleaseSnapshotResponse*) override;
  grpc::Status StreamStateDict(Context*, const v1::StreamStateDictRequest* request,
                               grpc::ServerWriter<v1::StatePart>* writer) override;
  grpc::Status ApplyStep(Context*, grpc::ServerReader<v1::StepPart>* reader,
                         v1::ApplyStepResponse* response) override;
  grpc::Status WatchModule(Context* context, const v1::WatchModuleRequest*,
                           grpc::ServerWriter<v1::WatchModuleResponse>* writer) override;

  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_CLIENT_FAKE_SERVER_H_
