#ifndef MODELSTATE_COMMON_FORMAT_SAFETENSORS_READER_H_
#define MODELSTATE_COMMON_FORMAT_SAFETENSORS_READER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/format/checkpoint_reader.h"

namespace modelstate {

// A safetensors file. Kinds, frozen parameters and digests come from our `__metadata__` keys where
// the file has them; a tied name that the writer recorded there is an alias, after its owner.
// Read is thread-safe: it only does positioned reads.
class SafetensorsReader : public CheckpointReader {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsReader>> Open(File file,
                                                                 bool allow_opaque = false);

  CheckpointFormat format() const override { return CheckpointFormat::kSafetensors; }
  absl::Status ReadWith(size_t index, absl::Span<uint8_t> out, ReadPass& pass) const override;
  absl::Status ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const override;
  std::optional<Extent> StoredAt(size_t index) const override;

 private:
  explicit SafetensorsReader(File file) : file_(std::move(file)) {}

  absl::Status ApplyKinds();
  absl::Status ApplyDigests();
  void AddAliases();
  // Valid until tensors_ changes.
  absl::flat_hash_map<absl::string_view, StoredTensor*> TensorsByName();

  File file_;
  std::vector<uint64_t> offsets_;  // of each tensor's first byte in the file
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_SAFETENSORS_READER_H_
