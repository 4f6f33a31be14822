#include "client/client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/connection.h"
#include "client/from_proto.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/optimizer_convert.h"
#include "common/wire/transport_tuning.h"

namespace modelstate::client {
namespace {

constexpr int kTensorPageSize = 10000;
constexpr int kVersionPageSize = 1000;

// Where 0 stands for all.
int PageSize(uint64_t wanted, int largest) {
  return wanted == 0 ? largest : static_cast<int>(std::min(wanted, static_cast<uint64_t>(largest)));
}

template <typename T>
bool Full(const std::vector<T>& items, uint64_t wanted) {
  return wanted != 0 && items.size() >= wanted;
}

template <typename T>
void Cut(uint64_t wanted, std::vector<T>* items) {
  if (Full(*items, wanted)) items->resize(wanted);
}

absl::StatusOr<TensorList> ListTensors(
    const Connection& connection,
    Connection::Method<v1::ListTensorsRequest, v1::ListTensorsResponse> method,
    const std::string& module, const ListOptions& options) {
  v1::ListTensorsRequest request;
  request.set_module(module);
  SelectionToProto(options.selection, request.mutable_selection());
  request.set_digests(options.digests);
  request.set_view(static_cast<v1::ListView>(options.view));
  request.set_statistics(options.statistics);
  request.set_page_size(PageSize(options.max_tensors, kTensorPageSize));
  TensorList list;
  do {
    MS_ASSIGN_OR_RETURN(const v1::ListTensorsResponse page,
                        connection.Call(method, request, /*idempotent=*/true));
    for (const v1::TensorInfo& proto : page.tensors()) {
      MS_ASSIGN_OR_RETURN(TensorInfo tensor, FromProto(proto));
      list.tensors.push_back(std::move(tensor));
    }
    list.total = page.total_size();
    list.version = VersionFromProto(page.version());
    list.step = page.step();
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty() && !Full(list.tensors, options.max_tensors));
  Cut(options.max_tensors, &list.tensors);
  return list;
}

absl::StatusOr<SnapshotInfo> Pin(const Connection& connection, const std::string& module,
                                 const std::string& snapshot_id, absl::Duration lease,
                                 bool optimizer_state, Cancellation* cancellation) {
  v1::PinSnapshotRequest request;
  request.set_module(module);
  request.set_snapshot_id(snapshot_id);
  request.set_optimizer_state(optimizer_state);
  if (lease > absl::ZeroDuration()) DurationToProto(lease, request.mutable_lease());
  // A new pin whose answer is lost ends with its lease, so it may be asked for again.
  MS_ASSIGN_OR_RETURN(const v1::Snapshot snapshot,
                      connection.Call(&v1::ModelState::Stub::PinSnapshot, request,
                                      /*idempotent=*/true, cancellation));
  return FromProto(snapshot);
}

}  // namespace

absl::StatusOr<Client> Client::Connect(const std::string& target, ClientOptions options) {
  MS_ASSIGN_OR_RETURN(Target parsed, ParseTarget(target));
  auto connection = std::make_shared<Connection>(std::move(parsed), options, /*own=*/false);
  if (!connection->channel()->WaitForConnected(
          absl::ToChronoTime(absl::Now() + options.connect_timeout))) {
    return absl::UnavailableError(absl::StrCat("no server answers at ", target, " within ",
                                               absl::FormatDuration(options.connect_timeout),
                                               "; is it running, and is this its address?"));
  }
  return Client(std::move(connection));
}

Client Client::WithOwnConnection() const {
  return Client(std::make_shared<Connection>(connection_->target(), connection_->options(),
                                             /*own=*/true));
}

const ClientOptions& Client::connection_options() const { return connection_->options(); }

absl::StatusOr<ServerInfo> Client::GetServerInfo() const {
  MS_ASSIGN_OR_RETURN(const v1::GetServerInfoResponse response,
                      connection_->Call(&v1::ModelState::Stub::GetServerInfo,
                                        v1::GetServerInfoRequest(), /*idempotent=*/true));
  return FromProto(response);
}

absl::StatusOr<ModuleInfo> Client::GetModule(const std::string& module) const {
  v1::GetModuleRequest request;
  request.set_module(module);
  MS_ASSIGN_OR_RETURN(const v1::Module response, connection_->Call(&v1::ModelState::Stub::GetModule,
                                                                   request, /*idempotent=*/true));
  return FromProto(response);
}

absl::StatusOr<std::vector<ModuleInfo>> Client::ListModules() const {
  v1::ListModulesRequest request;
  std::vector<ModuleInfo> modules;
  do {
    MS_ASSIGN_OR_RETURN(
        const v1::ListModulesResponse page,
        connection_->Call(&v1::ModelState::Stub::ListModules, request, /*idempotent=*/true));
    for (const v1::Module& module : page.modules()) modules.push_back(FromProto(module));
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return modules;
}

absl::Status Client::DeleteModule(const std::string& module) const {
  v1::DeleteModuleRequest request;
  request.set_module(module);
  return connection_->Call(&v1::ModelState::Stub::DeleteModule, request, /*idempotent=*/false)
      .status();
}

absl::StatusOr<ModuleInfo> Client::MoveModule(const std::string& module,
                                              const MoveOptions& options) const {
  v1::MoveModuleRequest request;
  request.set_module(module);
  request.set_device(options.device);
  if (options.dtype) request.set_dtype(DTypeToProto(*options.dtype));
  // Moved once more, nothing changes.
  MS_ASSIGN_OR_RETURN(
      const v1::Module response,
      connection_->Call(&v1::ModelState::Stub::MoveModule, request, /*idempotent=*/true));
  return FromProto(response);
}

absl::StatusOr<std::vector<VersionInfo>> Client::ListVersions(const std::string& module,
                                                              uint64_t limit) const {
  v1::ListVersionsRequest request;
  request.set_module(module);
  request.set_page_size(PageSize(limit, kVersionPageSize));
  std::vector<VersionInfo> versions;
  do {
    MS_ASSIGN_OR_RETURN(
        const v1::ListVersionsResponse page,
        connection_->Call(&v1::ModelState::Stub::ListVersions, request, /*idempotent=*/true));
    for (const v1::VersionInfo& version : page.versions()) versions.push_back(FromProto(version));
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty() && !Full(versions, limit));
  Cut(limit, &versions);
  return versions;
}

absl::StatusOr<uint64_t> Client::SetRequiresGrad(const std::string& module,
                                                 const Selection& selection,
                                                 bool requires_grad) const {
  v1::SetRequiresGradRequest request;
  request.set_module(module);
  SelectionToProto(selection, request.mutable_selection());
  request.set_requires_grad(requires_grad);
  MS_ASSIGN_OR_RETURN(
      const v1::SetRequiresGradResponse response,
      connection_->Call(&v1::ModelState::Stub::SetRequiresGrad, request, /*idempotent=*/false));
  return response.changed();
}

absl::StatusOr<TensorList> Client::ListParameters(const std::string& module,
                                                  const ListOptions& options) const {
  return ListTensors(*connection_, &v1::ModelState::Stub::ListParameters, module, options);
}

absl::StatusOr<TensorList> Client::ListBuffers(const std::string& module,
                                               const ListOptions& options) const {
  return ListTensors(*connection_, &v1::ModelState::Stub::ListBuffers, module, options);
}

absl::StatusOr<TensorList> Client::ListOptimizerState(const std::string& module,
                                                      const ListOptions& options) const {
  return ListTensors(*connection_, &v1::ModelState::Stub::ListOptimizerState, module, options);
}

absl::StatusOr<TensorElements> Client::GetTensor(const std::string& module, const std::string& name,
                                                 const GetTensorOptions& options) const {
  v1::GetTensorRequest request;
  request.set_module(module);
  request.set_name(name);
  request.set_first(options.first);
  request.set_count(options.count);
  request.set_snapshot_id(options.snapshot_id);
  request.set_slice(options.slice);
  MS_ASSIGN_OR_RETURN(
      const v1::GetTensorResponse response,
      connection_->Call(&v1::ModelState::Stub::GetTensor, request, /*idempotent=*/true));
  TensorElements elements;
  MS_ASSIGN_OR_RETURN(elements.tensor, FromProto(response.tensor()));
  const v1::Values& values = response.tensor().values();
  elements.doubles.assign(values.doubles().values().begin(), values.doubles().values().end());
  elements.ints.assign(values.ints().values().begin(), values.ints().values().end());
  elements.first = response.first();
  elements.slice_shape.assign(response.slice_shape().begin(), response.slice_shape().end());
  if (options.slice.empty()) {
    const absl::Span<const int64_t> dims = elements.tensor.spec.shape.dims();
    elements.slice_shape.assign(dims.begin(), dims.end());
  }
  elements.statistics = FromProto(response.statistics());
  elements.version = VersionFromProto(response.version());
  elements.step = response.step();
  return elements;
}

absl::StatusOr<OptimizerInfo> Client::ConfigureOptimizer(const std::string& module,
                                                         const OptimizerConfig& config,
                                                         bool reset_state) const {
  v1::ConfigureOptimizerRequest request;
  request.set_module(module);
  OptimizerConfigToProto(config, request.mutable_optimizer());
  request.set_reset_state(reset_state);
  MS_ASSIGN_OR_RETURN(
      const v1::Optimizer response,
      connection_->Call(&v1::ModelState::Stub::ConfigureOptimizer, request, /*idempotent=*/false));
  return FromProto(response);
}

absl::StatusOr<OptimizerInfo> Client::GetOptimizer(const std::string& module) const {
  v1::GetOptimizerRequest request;
  request.set_module(module);
  MS_ASSIGN_OR_RETURN(
      const v1::Optimizer response,
      connection_->Call(&v1::ModelState::Stub::GetOptimizer, request, /*idempotent=*/true));
  return FromProto(response);
}

absl::StatusOr<std::vector<CheckpointInfo>> Client::ListCheckpoints(const std::string& directory,
                                                                    bool verify,
                                                                    bool recursive) const {
  v1::ListCheckpointsRequest request;
  request.set_directory(directory);
  request.set_verify(verify);
  request.set_recursive(recursive);
  std::vector<CheckpointInfo> checkpoints;
  do {
    MS_ASSIGN_OR_RETURN(
        const v1::ListCheckpointsResponse page,
        connection_->Call(&v1::ModelState::Stub::ListCheckpoints, request, /*idempotent=*/true));
    for (const v1::Checkpoint& checkpoint : page.checkpoints()) {
      checkpoints.push_back(FromProto(checkpoint));
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return checkpoints;
}

absl::Status Client::DeleteCheckpoint(const std::string& path) const {
  v1::DeleteCheckpointRequest request;
  request.set_path(path);
  return connection_->Call(&v1::ModelState::Stub::DeleteCheckpoint, request, /*idempotent=*/false)
      .status();
}

absl::StatusOr<SnapshotInfo> Client::PinSnapshot(const std::string& module, absl::Duration lease,
                                                 bool optimizer_state) const {
  return Pin(*connection_, module, "", lease, optimizer_state, nullptr);
}

absl::StatusOr<SnapshotInfo> Client::RenewSnapshot(const std::string& module,
                                                   const std::string& snapshot_id,
                                                   absl::Duration lease,
                                                   Cancellation* cancellation) const {
  return Pin(*connection_, module, snapshot_id, lease, /*optimizer_state=*/false, cancellation);
}

absl::Status Client::ReleaseSnapshot(const std::string& snapshot_id) const {
  v1::ReleaseSnapshotRequest request;
  request.set_snapshot_id(snapshot_id);
  return connection_->Call(&v1::ModelState::Stub::ReleaseSnapshot, request, /*idempotent=*/false)
      .status();
}

}  // namespace modelstate::client
