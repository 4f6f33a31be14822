// The calls that answer with a stream of events: progress, and newer versions.
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/connection.h"
#include "client/from_proto.h"
#include "client/key_lists.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

// Reads a stream of Response until `event` returns false or it ends. The generated reader polls in
// this thread.
template <typename Request, typename Response>
absl::Status ReadEvents(const Connection& connection,
                        std::unique_ptr<grpc::ClientReader<Response>> (
                            v1::ModelState::Stub::*method)(grpc::ClientContext*, const Request&),
                        const Request& request, Cancellation* cancellation,
                        const std::function<bool(const Response&)>& event) {
  grpc::ClientContext context;
  CancellationScope scope(cancellation, &context);
  std::unique_ptr<grpc::ClientReader<Response>> reader =
      (connection.stub().*method)(&context, request);
  Response response;
  bool stopped = false;
  while (!stopped && reader->Read(&response)) stopped = !event(response);
  if (stopped) context.TryCancel();
  absl::Status status = FromGrpcStatus(reader->Finish());
  return stopped ? absl::OkStatus() : status;
}

absl::Status NoResult(absl::string_view call) {
  return absl::InternalError(
      absl::StrCat(call, " ended without a result; look whether it was done"));
}

}  // namespace

absl::StatusOr<LoadCheckpointResult> Client::LoadCheckpoint(const std::string& module,
                                                            const std::string& path,
                                                            const LoadCheckpointOptions& options,
                                                            const ProgressCallback& progress,
                                                            Cancellation* cancellation) const {
  v1::LoadCheckpointRequest request;
  request.set_module(module);
  request.set_path(path);
  ToProto(options.load, request.mutable_options());
  request.set_create_module(options.create_module);
  request.set_state_dict_key(options.state_dict_key);
  request.set_weights_only(options.weights_only);
  const auto call = [&]() -> absl::StatusOr<LoadCheckpointResult> {
    std::optional<LoadCheckpointResult> result;
    MS_RETURN_IF_ERROR((ReadEvents<v1::LoadCheckpointRequest, v1::LoadCheckpointResponse>(
        *connection_, &v1::ModelState::Stub::LoadCheckpoint, request, cancellation,
        [&](const v1::LoadCheckpointResponse& response) {
          if (response.has_progress() && progress) progress(FromProto(response.progress()));
          if (response.has_result()) result = FromProto(response.result());
          return true;
        })));
    if (!result) return NoResult("LoadCheckpoint");
    return *std::move(result);
  };
  MS_ASSIGN_OR_RETURN(LoadCheckpointResult result, call());
  if (options.load.dry_run) {
    MS_RETURN_IF_ERROR(CompleteKeyLists(
        [&](uint64_t skip_keys) -> absl::StatusOr<LoadResult> {
          request.mutable_options()->set_skip_keys(skip_keys);
          MS_ASSIGN_OR_RETURN(LoadCheckpointResult more, call());
          return std::move(more.load);
        },
        &result.load));
  }
  return result;
}

absl::StatusOr<CheckpointInfo> Client::SaveCheckpoint(const std::string& module,
                                                      const std::string& path,
                                                      const SaveCheckpointOptions& options,
                                                      const ProgressCallback& progress,
                                                      Cancellation* cancellation) const {
  v1::SaveCheckpointRequest request;
  request.set_module(module);
  request.set_path(path);
  request.set_overwrite(options.overwrite);
  request.set_weights_only(options.weights_only);
  std::optional<CheckpointInfo> result;
  MS_RETURN_IF_ERROR((ReadEvents<v1::SaveCheckpointRequest, v1::SaveCheckpointResponse>(
      *connection_, &v1::ModelState::Stub::SaveCheckpoint, request, cancellation,
      [&](const v1::SaveCheckpointResponse& response) {
        if (response.has_progress() && progress) progress(FromProto(response.progress()));
        if (response.has_result()) result = FromProto(response.result());
        return true;
      })));
  if (!result) return NoResult("SaveCheckpoint");
  return *std::move(result);
}

absl::Status Client::Watch(const std::string& module,
                           const std::function<bool(const WatchEvent&)>& event,
                           Cancellation* cancellation) const {
  v1::WatchModuleRequest request;
  request.set_module(module);
  return ReadEvents<v1::WatchModuleRequest, v1::WatchModuleResponse>(
      *connection_, &v1::ModelState::Stub::WatchModule, request, cancellation,
      [&](const v1::WatchModuleResponse& response) {
        return event({FromProto(response.module()), MutationName(response.last_mutation())});
      });
}

}  // namespace modelstate::client
