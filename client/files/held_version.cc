#include "client/files/held_version.h"

#include "common/base/status.h"

namespace modelstate::client {

absl::StatusOr<HeldVersion> HoldVersion(const Client& client, const std::string& module,
                                        uint64_t version, const std::string& snapshot_id,
                                        absl::Duration lease) {
  HeldVersion held;
  held.snapshot_id = snapshot_id;
  if (!snapshot_id.empty()) return held;
  MS_ASSIGN_OR_RETURN(const SnapshotInfo pin, client.PinSnapshot(module, lease));
  if (version != 0 && pin.version.number != version) {
    (void)client.ReleaseSnapshot(pin.snapshot_id);
    held.version.number = version;
    return held;
  }
  held.snapshot_id = pin.snapshot_id;
  held.version = pin.version;
  held.own_pin = true;
  return held;
}

}  // namespace modelstate::client
