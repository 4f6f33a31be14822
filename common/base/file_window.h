#ifndef MODELSTATE_COMMON_BASE_FILE_WINDOW_H_
#define MODELSTATE_COMMON_BASE_FILE_WINDOW_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/huge_buffer.h"

namespace modelstate {

// Reads files that are mostly read on and on. What the page cache holds comes from it; the rest
// comes past it (O_DIRECT), in windows that end where the caller has no use for more, which is
// faster for what is read once and leaves the cache to others. Where there is no O_DIRECT, and for
// little, it reads through the cache. Thread-compatible.
class FileWindow {
 public:
  static constexpr uint64_t kMaxBytes = uint64_t{2} << 20;

  // `bytes` of memory at most, from the first read past the cache on; a multiple of 4096. A disk
  // takes twice the time where they are not whole huge pages (2 MiB).
  explicit FileWindow(uint64_t bytes = kMaxBytes) : capacity_(bytes) {}

  // As File::ReadAt. Bytes up to `end` will be asked for next. A file that has been read here is
  // not replaced by another in the same place of memory.
  absl::Status ReadAt(const File& file, uint64_t offset, absl::Span<uint8_t> out, uint64_t end);

 private:
  // Moves the window to begin at `offset`, which it then has, and end at `end` at most.
  absl::Status Fill(uint64_t offset, uint64_t end);

  const uint64_t capacity_;
  const File* file_ = nullptr;
  enum { kUntried, kDirect, kNone } state_ = kUntried;  // whether it has a way past the page cache
  File direct_;                                         // that way
  // The window.
  uint64_t begin_ = 0;
  uint64_t end_ = 0;
  bool cached_ = false;  // its bytes come from the page cache, else from memory_
  HugeBuffer memory_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_FILE_WINDOW_H_
