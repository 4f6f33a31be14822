#ifndef MODELSTATE_COMMON_FORMAT_TORCH_ZIP_READER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_ZIP_READER_H_

#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"
#include "common/format/torch_tensor_reader.h"

namespace modelstate {

// A file that torch.save wrote (1.6 or newer). Nothing in it is executed.
class TorchZipReader : public TorchTensorReader {
 public:
  // By the first bytes, which also a file has that is cut off after them.
  static bool Matches(absl::string_view head);
  static absl::StatusOr<std::unique_ptr<TorchTensorReader>> Open(File file, Extract extract);

 private:
  explicit TorchZipReader(File file)
      : TorchTensorReader(std::move(file), CheckpointFormat::kTorchZip) {}
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_ZIP_READER_H_
