#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/service.h"

namespace modelstate {
namespace {

constexpr absl::Duration kDefaultLease = absl::Seconds(60);

void PinToProto(const PinTable::Pin& pin, v1::Snapshot* proto) {
  const StateLayout& layout = pin.snapshot->schema->state_dict()->layout;
  proto->set_snapshot_id(pin.id);
  proto->set_module(pin.module->name());
  VersionToProto(pin.snapshot->version, proto->mutable_version());
  proto->set_step(pin.snapshot->step);
  proto->set_layout_digest(layout.digest());
  proto->set_total_bytes(layout.total_bytes());
  TimeToProto(pin.expire_time, proto->mutable_expire_time());
  proto->set_optimizer_state(pin.optimizer != nullptr);
}

absl::StatusOr<PinTable::Pin> Renew(PinTable& pins, const v1::PinSnapshotRequest& request,
                                    absl::Duration lease) {
  MS_ASSIGN_OR_RETURN(const PinTable::Pin pin, pins.Find(request.snapshot_id()));
  if (!request.module().empty() && pin.module->name() != request.module()) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("snapshot_id is of module \"", pin.module->name(),
                                  "\", not of \"", request.module(), "\""),
                     {{"field", "module"}});
  }
  if (request.optimizer_state() && pin.optimizer == nullptr) {
    return MakeError(Reason::kInvalidField,
                     "optimizer_state: the snapshot was pinned without it, and a renewal adds "
                     "none; pin the module anew, with it",
                     {{"field", "optimizer_state"}});
  }
  return pins.Renew(request.snapshot_id(), lease);
}

}  // namespace

void ModelStateService::PinSnapshot(UnaryCall* call, const v1::PinSnapshotRequest* request,
                                    v1::Snapshot* response) {
  call->AnswerLater([&]() -> absl::Status {
    PinTable& pins = *runtime_.pins;
    absl::Duration lease = std::min(kDefaultLease, pins.max_lease());
    if (request->has_lease()) {
      MS_ASSIGN_OR_RETURN(lease, DurationFromProto(request->lease(), "lease"));
    }
    const auto answer = [call, response](absl::StatusOr<PinTable::Pin> pin) {
      const absl::Status status = pin.status();
      if (pin.ok()) PinToProto(*pin, response);
      pin = absl::CancelledError();  // only the table holds it when the caller hears of it
      call->Finish(status);
    };
    if (!request->snapshot_id().empty()) {
      answer(Renew(pins, *request, lease));
      return absl::OkStatus();
    }
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    if (!request->optimizer_state()) {
      answer(pins.Create(module, lease));
      return absl::OkStatus();
    }
    module->HoldWithOptimizer(
        Selection(), [&pins, module, lease, answer](absl::StatusOr<CapturedState> held) {
          if (!held.ok()) return answer(held.status());
          absl::StatusOr<PinTable::Pin> pin = pins.Create(module, lease, *std::move(held));
          answer(std::move(pin));
        });
    return absl::OkStatus();
  });
}

void ModelStateService::ReleaseSnapshot(UnaryCall* call, const v1::ReleaseSnapshotRequest* request,
                                        v1::ReleaseSnapshotResponse*) {
  call->AnswerNow([&] { return runtime_.pins->Release(request->snapshot_id()); });
}

}  // namespace modelstate
