#ifndef MODELSTATE_CLIENT_FILES_FOLLOW_FILE_H_
#define MODELSTATE_CLIENT_FILES_FOLLOW_FILE_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "client/client.h"

namespace modelstate::client {

struct FollowedFile {
  std::string path;
  Version version;
  uint64_t step = 0;
  uint64_t file_bytes = 0;
  uint64_t tensors = 0;
  FollowUpdate update;
};

// Client::Follow into safetensors files. `path` is a file, which is replaced by each new version in
// one rename; or a folder that exists, which gets a file MODULE-vNUMBER.safetensors for each (a '/'
// in the module's name becomes '_'). What is there is always one whole version, synced.
// `on_file` is called after each; false ends it. Errors: also RESOURCE_EXHAUSTED STORAGE_FULL,
// INTERNAL STORAGE_ERROR of the local disk.
absl::Status FollowToFile(const Client& client, const std::string& module, const std::string& path,
                          const FollowOptions& options,
                          const std::function<bool(const FollowedFile&)>& on_file,
                          Cancellation* cancellation = nullptr);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_FOLLOW_FILE_H_
