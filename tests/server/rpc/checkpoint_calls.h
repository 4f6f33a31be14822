#ifndef MODELSTATE_TESTS_SERVER_RPC_CHECKPOINT_CALLS_H_
#define MODELSTATE_TESTS_SERVER_RPC_CHECKPOINT_CALLS_H_

#include <string>
#include <vector>

#include "tests/server/rpc/server_fixture.h"

namespace modelstate {

// A server and calls of LoadCheckpoint.
class CheckpointCalls : public ServerTest {
 protected:
  absl::StatusOr<v1::LoadCheckpointResult> LoadFile(const v1::LoadCheckpointRequest& request) {
    grpc::ClientContext context;
    auto reader = stub_->LoadCheckpoint(&context, request);
    v1::LoadCheckpointResponse event;
    v1::LoadCheckpointResult result;
    while (reader->Read(&event)) {
      if (event.has_result()) result = event.result();
      if (event.has_progress()) phases_.push_back(event.progress().phase());
    }
    const grpc::Status status = reader->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return result;
  }
  absl::StatusOr<v1::LoadCheckpointResult> LoadFile(const std::string& module,
                                                    const std::string& path,
                                                    const v1::LoadOptions& options = {},
                                                    bool create = false) {
    v1::LoadCheckpointRequest request = LoadRequest(module, path, create);
    *request.mutable_options() = options;
    return LoadFile(request);
  }
  static v1::LoadCheckpointRequest LoadRequest(const std::string& module, const std::string& path,
                                               bool create) {
    v1::LoadCheckpointRequest request;
    request.set_module(module);
    request.set_path(path);
    request.set_create_module(create);
    return request;
  }

  std::vector<std::string> phases_;  // of all loads, as they were reported
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_RPC_CHECKPOINT_CALLS_H_
