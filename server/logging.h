#ifndef MODELSTATE_SERVER_LOGGING_H_
#define MODELSTATE_SERVER_LOGGING_H_

#include <string>

namespace modelstate {

// Sends the log (gRPC's own too) to stderr: a line per entry, as text or as a JSON object with
// time, level and message. `level` is one that spdlog knows.
void SetUpLogging(const std::string& level, bool json);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_LOGGING_H_
