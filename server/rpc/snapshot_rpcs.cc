#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/service.h"
#include "server/rpc/unary_handler.h"

namespace modelstate {
namespace {

constexpr absl::Duration kDefaultLease = absl::Seconds(60);

}  // namespace

grpc::ServerUnaryReactor* ModelStateService::PinSnapshot(Context*,
                                                         const v1::PinSnapshotRequest* request,
                                                         v1::Snapshot* response) {
  return UnaryHandler::AnswerNow(runtime_, [&]() -> absl::Status {
    if (request->optimizer_state()) {
      return MakeError(Reason::kNotImplemented,
                       "optimizer_state is not built yet: leave it out; ListOptimizerState shows "
                       "it, and SaveCheckpoint keeps it");
    }
    absl::Duration lease = std::min(kDefaultLease, runtime_.pins->max_lease());
    if (request->has_lease()) {
      MS_ASSIGN_OR_RETURN(lease, DurationFromProto(request->lease(), "lease"));
    }
    PinTable::Pin pin;
    if (request->snapshot_id().empty()) {
      MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                          runtime_.FindModule(request->module()));
      MS_ASSIGN_OR_RETURN(pin, runtime_.pins->Create(module, lease));
    } else {
      if (!request->module().empty()) {
        MS_ASSIGN_OR_RETURN(pin, runtime_.pins->Find(request->snapshot_id()));
        if (pin.module->name() != request->module()) {
          return MakeError(Reason::kInvalidField,
                           absl::StrCat("snapshot_id is of module \"", pin.module->name(),
                                        "\", not of \"", request->module(), "\""),
                           {{"field", "module"}});
        }
      }
      MS_ASSIGN_OR_RETURN(pin, runtime_.pins->Renew(request->snapshot_id(), lease));
    }
    const StateLayout& layout = pin.snapshot->schema->state_dict()->layout;
    response->set_snapshot_id(pin.id);
    response->set_module(pin.module->name());
    VersionToProto(pin.snapshot->version, response->mutable_version());
    response->set_step(pin.snapshot->step);
    response->set_layout_digest(layout.digest());
    response->set_total_bytes(layout.total_bytes());
    TimeToProto(pin.expire_time, response->mutable_expire_time());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelStateService::ReleaseSnapshot(
    Context*, const v1::ReleaseSnapshotRequest* request, v1::ReleaseSnapshotResponse*) {
  return UnaryHandler::AnswerNow(runtime_,
                                 [&] { return runtime_.pins->Release(request->snapshot_id()); });
}

}  // namespace modelstate
