#ifndef MODELSTATE_CLIENT_FILES_TENSOR_FILE_H_
#define MODELSTATE_CLIENT_FILES_TENSOR_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/types.h"

namespace modelstate::client {

// All tensors of a safetensors or PyTorch file, read into memory, to be sent. Immutable; refs()
// borrow from it.
class TensorFile {
 public:
  // Errors are those of CheckpointReader.
  static absl::StatusOr<TensorFile> Read(const std::string& path);

  // In the order of the file. The kind is what the file says, else `default_kind`; a tied name
  // comes with alias_of and no bytes.
  std::vector<TensorRef> refs(TensorKind default_kind) const;

 private:
  struct Entry {
    TensorSpec spec;
    bool has_kind = false;
    uint64_t offset = 0;
  };

  std::vector<Entry> entries_;
  std::unique_ptr<uint8_t[]> data_;
};

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_TENSOR_FILE_H_
