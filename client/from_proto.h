#ifndef MODELSTATE_CLIENT_FROM_PROTO_H_
#define MODELSTATE_CLIENT_FROM_PROTO_H_

#include <string>

#include "absl/status/statusor.h"
#include "client/types.h"
#include "modelstate/v1/checkpoint.pb.h"
#include "modelstate/v1/module.pb.h"
#include "modelstate/v1/state.pb.h"
#include "modelstate/v1/step.pb.h"

// The wire's messages <-> client/types.h. Internal to the library.
namespace modelstate::client {

ServerInfo FromProto(const v1::GetServerInfoResponse& proto);
ModuleInfo FromProto(const v1::Module& proto);
TensorStatistics FromProto(const v1::TensorStatistics& proto);
VersionInfo FromProto(const v1::VersionInfo& proto);
absl::StatusOr<TensorInfo> FromProto(const v1::TensorInfo& proto);
absl::StatusOr<OptimizerInfo> FromProto(const v1::Optimizer& proto);
StepResult FromProto(const v1::ApplyStepResponse& proto);
LoadResult FromProto(const v1::LoadResult& proto);
LoadCheckpointResult FromProto(const v1::LoadCheckpointResult& proto);
CheckpointInfo FromProto(const v1::Checkpoint& proto);
SnapshotInfo FromProto(const v1::Snapshot& proto);
Progress FromProto(const v1::Progress& proto);

void ToProto(const LoadOptions& value, v1::LoadOptions* proto);

// "STEP"; "UNKNOWN" for a kind that this build does not know.
std::string MutationName(v1::MutationKind kind);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FROM_PROTO_H_
