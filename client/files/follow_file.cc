#include "client/files/follow_file.h"

#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/file.h"
#include "common/base/state_layout.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"

namespace modelstate::client {
namespace {

class FileWriter {
 public:
  FileWriter(std::string module, std::string path)
      : module_(std::move(module)), path_(std::move(path)) {
    std::error_code error;
    is_folder_ = std::filesystem::is_directory(path_, error);
  }

  absl::StatusOr<FollowedFile> Write(const StateDict& state, const FollowUpdate& update) {
    if (update.whole) {
      layout_ = StateLayout(state.specs());
      digests_.assign(state.size(), 0);
    }
    for (size_t i : update.changed) {
      if (layout_.owns_bytes(i)) digests_[i] = Xxh3(state.bytes(i));
    }
    FollowedFile file;
    file.path = is_folder_ ? absl::StrCat(path_, "/", absl::StrReplaceAll(module_, {{"/", "_"}}),
                                          "-v", state.version().number, ".safetensors")
                           : path_;
    MS_ASSIGN_OR_RETURN(const std::string header,
                        SafetensorsHeader(state.specs(), layout_,
                                          StateDictMetadata(module_, state.version(), state.step(),
                                                            state.specs(), digests_)));
    MS_RETURN_IF_ERROR(ReplaceFile(file.path, {AsBytes(header), state.data()}));
    file.version = state.version();
    file.step = state.step();
    file.file_bytes = header.size() + state.data().size();
    file.tensors = state.size();
    file.update = update;
    return file;
  }

 private:
  const std::string module_;
  const std::string path_;
  bool is_folder_ = false;
  StateLayout layout_;
  std::vector<uint64_t> digests_;
};

}  // namespace

absl::Status FollowToFile(const Client& client, const std::string& module, const std::string& path,
                          const FollowOptions& options,
                          const std::function<bool(const FollowedFile&)>& on_file,
                          Cancellation* cancellation) {
  FileWriter writer(module, path);
  return client.Follow(
      module, options,
      [&](const StateDict& state, const FollowUpdate& update) -> absl::StatusOr<bool> {
        MS_ASSIGN_OR_RETURN(const FollowedFile file, writer.Write(state, update));
        return on_file(file);
      },
      cancellation);
}

}  // namespace modelstate::client
