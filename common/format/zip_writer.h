#ifndef MODELSTATE_COMMON_FORMAT_ZIP_WRITER_H_
#define MODELSTATE_COMMON_FORMAT_ZIP_WRITER_H_

#include <cstdint>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"

namespace modelstate {

// A zip archive as torch.save lays it out: stored records whose bytes begin at multiples of 64,
// with zip64 fields where 32 bits do not do. Thread-compatible.
class ZipWriter {
 public:
  // Into `file` from its beginning; borrowed.
  explicit ZipWriter(const File& file) : file_(file) {}

  // One record. `name` is at most 65535 bytes.
  absl::Status Add(absl::string_view name, absl::Span<const uint8_t> bytes);
  // One of `size` bytes that come piece by piece: `content` gives them, in order, to what it is
  // called with. INTERNAL where it gives another number; an error of it is passed on.
  using TakeBytes = absl::FunctionRef<absl::Status(absl::Span<const uint8_t> bytes)>;
  absl::Status AddStream(absl::string_view name, uint64_t size,
                         absl::FunctionRef<absl::Status(TakeBytes take)> content);
  // The directory; nothing may follow.
  absl::Status Finish();

 private:
  absl::Status Write(absl::Span<const uint8_t> bytes);

  const File& file_;
  uint64_t offset_ = 0;
  uint64_t records_ = 0;
  std::string directory_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_ZIP_WRITER_H_
