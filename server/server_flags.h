#ifndef MODELSTATE_SERVER_SERVER_FLAGS_H_
#define MODELSTATE_SERVER_SERVER_FLAGS_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/rpc/server.h"

namespace modelstate {

struct ServerFlags {
  ServerOptions options;
  std::string log_level;  // as spdlog names them
  bool log_json = false;
  bool help = false;
};

// Reads the command line, then for each flag that is not on it the environment variable
// MODELSTATE_<FLAG> in upper case. INVALID_ARGUMENT says which flag or variable is wrong and what
// it may be.
absl::StatusOr<ServerFlags> ParseServerFlags(absl::Span<char* const> arguments);

// What --help prints.
std::string ServerFlagsHelp();

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_SERVER_FLAGS_H_
