#ifndef MODELSTATE_CLIENT_FILES_TENSOR_SOURCE_H_
#define MODELSTATE_CLIENT_FILES_TENSOR_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/client.h"

namespace modelstate::client {

// Tensors that can be read a few at a time: a file, or one version of a module. Thread-compatible.
class TensorSource {
 public:
  virtual ~TensorSource() = default;

  // For messages: the path, or "crepe, version 7".
  const std::string& name() const { return name_; }
  // In state_dict order, or that of the file.
  absl::Span<const TensorSpec> specs() const { return specs_; }

  // Elements of the tensors at `indices`, in that order, row-major and little-endian; also of tied
  // ones. Valid until the next call.
  virtual absl::StatusOr<std::vector<absl::Span<const uint8_t>>> Read(
      absl::Span<const size_t> indices) = 0;
  // A part of one tensor, for those that are better not held whole: parts are read in order, the
  // first from offset 0. Valid until the next call. Unless a source can do better, it reads the
  // tensor for the first part and holds it.
  virtual absl::StatusOr<absl::Span<const uint8_t>> ReadPart(size_t index, uint64_t offset,
                                                             uint64_t bytes);

 protected:
  std::string name_;
  std::vector<TensorSpec> specs_;

 private:
  absl::Span<const uint8_t> whole_;  // that ReadPart gives parts of
};

// A safetensors or PyTorch file, or an index of such and its shards. Errors are those of
// CheckpointReader.
absl::StatusOr<std::unique_ptr<TensorSource>> OpenFileSource(const std::string& path);

inline constexpr absl::Duration kSourceLease = absl::Seconds(60);

// The state_dict of a version of `module`: what the pin `snapshot_id` holds, or the number
// `version`, or (neither) the newest. The newest is pinned until the source is destroyed, and its
// lease renewed from a thread meanwhile; another must stay held by whoever holds it. Errors are
// those of GetModule, PinSnapshot and Fetch; Read says also why the pin could not be renewed.
absl::StatusOr<std::unique_ptr<TensorSource>> OpenModuleSource(const Client& client,
                                                               const std::string& module,
                                                               uint64_t version,
                                                               const std::string& snapshot_id,
                                                               Cancellation* cancellation,
                                                               absl::Duration lease = kSourceLease);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_TENSOR_SOURCE_H_
