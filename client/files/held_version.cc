#include "client/files/held_version.h"

#include "common/base/status.h"

namespace modelstate::client {

absl::StatusOr<HeldVersion> HoldVersion(const Client& client, const std::string& module,
                                        uint64_t version, const std::string& snapshot_id,
                                        absl::Duration lease, bool optimizer_state) {
  HeldVersion held;
  held.snapshot_id = snapshot_id;
  if (!snapshot_id.empty()) return held;
  held.version.number = version;
  if (version != 0) {
    MS_ASSIGN_OR_RETURN(const ModuleInfo info, client.GetModule(module));
    if (info.version.number != version) return held;
  }
  const absl::StatusOr<SnapshotInfo> pin = client.PinSnapshot(module, lease, optimizer_state);
  // Readable without a pin while it is current, and by the pins of others after that.
  if (version != 0 && GetReason(pin.status()) == Reason::kSnapshotLimit) return held;
  MS_RETURN_IF_ERROR(pin.status());
  if (version != 0 && pin->version.number != version) {
    // Another was published between the two calls.
    (void)client.ReleaseSnapshot(pin->snapshot_id);
    return held;
  }
  held.snapshot_id = pin->snapshot_id;
  held.version = pin->version;
  held.own_pin = true;
  return held;
}

}  // namespace modelstate::client
