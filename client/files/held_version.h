#ifndef MODELSTATE_CLIENT_FILES_HELD_VERSION_H_
#define MODELSTATE_CLIENT_FILES_HELD_VERSION_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/client.h"

namespace modelstate::client {

// A version to read in several calls.
struct HeldVersion {
  std::string snapshot_id;  // empty: by `version`, which somebody else holds
  Version version;          // incarnation and number are 0 where not known yet
  bool own_pin = false;     // made here: to be renewed and released here
};

// `snapshot_id`: what that pin holds; its lease is left alone. `version`, where not 0: that one,
// with a pin of our own when it is the current one and the budget for pins allows it. Neither: the
// current one, with a pin. `optimizer_state`: a pin of our own holds that too. Errors are those of
// GetModule and PinSnapshot; whether a pin or version of another is held, its first use says.
absl::StatusOr<HeldVersion> HoldVersion(const Client& client, const std::string& module,
                                        uint64_t version, const std::string& snapshot_id,
                                        absl::Duration lease, bool optimizer_state = false);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_HELD_VERSION_H_
