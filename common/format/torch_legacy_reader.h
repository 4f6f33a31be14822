#ifndef MODELSTATE_COMMON_FORMAT_TORCH_LEGACY_READER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_LEGACY_READER_H_

#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"
#include "common/format/torch_tensor_reader.h"

namespace modelstate {

// A stream that torch.save wrote before PyTorch 1.6, or since then on request: five pickles (a
// magic number, a protocol number, facts of the machine, the object, the keys of its storages),
// then of each key in turn a count and the elements, little-endian whatever the machine was. It has
// no digest of any kind. Nothing in it is executed.
class TorchLegacyReader : public TorchTensorReader {
 public:
  static bool Matches(absl::string_view head);
  static absl::StatusOr<std::unique_ptr<TorchTensorReader>> Open(File file, Extract extract);

 private:
  explicit TorchLegacyReader(File file)
      : TorchTensorReader(std::move(file), CheckpointFormat::kTorchLegacy) {}
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_LEGACY_READER_H_
