#ifndef MODELSTATE_CLIENT_TARGET_H_
#define MODELSTATE_CLIENT_TARGET_H_

#include <string>

#include "absl/status/statusor.h"

// Internal to the library: not installed.
namespace modelstate::client {

// Where a channel leads.
struct Target {
  std::string uri;        // for gRPC
  std::string first;      // of several addresses; for one, `uri`
  std::string authority;  // empty: gRPC's own
};

// `text` is HOST:PORT, several separated by commas, or a gRPC target. Names in a list are looked up
// here, once, which may block: gRPC has no resolver for lists of names. INVALID_ARGUMENT where the
// list is malformed, UNAVAILABLE where no name in it is known.
absl::StatusOr<Target> ParseTarget(const std::string& text);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_TARGET_H_
