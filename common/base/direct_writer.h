#ifndef MODELSTATE_COMMON_BASE_DIRECT_WRITER_H_
#define MODELSTATE_COMMON_BASE_DIRECT_WRITER_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/huge_buffer.h"

namespace modelstate {

// Writes a new file past the page cache: from some offset to its end in blocks, of which two are on
// their way to the disk while the caller fills the next, and last what comes before that offset,
// which may depend on the rest. Where a file system has no O_DIRECT it goes through the page cache.
// Holds at most kBlocks blocks of memory. A file of one block needs no thread. Thread-compatible.
class DirectWriter {
 public:
  // What O_DIRECT wants of offsets and memory on every disk that is known.
  static constexpr uint64_t kAlignment = 4096;
  static constexpr uint64_t kBlockBytes = uint64_t{4} << 20;
  static constexpr int kBlocks = 4;
  static constexpr size_t kThreads = 2;

  // Takes over `file`, which is new and empty, and sets `size` bytes aside for it on the disk.
  // Append begins at `begin`, a multiple of kAlignment. STORAGE_FULL where there is no room for it;
  // STORAGE_ERROR.
  static absl::StatusOr<std::unique_ptr<DirectWriter>> Start(File file, uint64_t begin,
                                                             uint64_t size);
  // Ends what is under way; without Finish the file is not whole.
  ~DirectWriter();

  // Copies `bytes`. An error may be of bytes that were appended before.
  absl::Status Append(absl::Span<const uint8_t> bytes);
  // Writes what is left and `head`, the bytes before `begin`, and syncs the data. Once.
  absl::Status Finish(absl::Span<const uint8_t> head);

  // Where the next byte goes.
  uint64_t offset() const { return offset_ + filled_; }

 private:
  struct Filled {
    HugeBuffer block;
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };

  explicit DirectWriter(File file, uint64_t begin) : file_(std::move(file)), offset_(begin) {}

  absl::Status TakeBlock();
  void HandOver();
  void WriteQueue();
  absl::Status EndThreads();

  const File file_;
  HugeBuffer filling_;
  uint64_t offset_;  // of filling_
  uint64_t filled_ = 0;
  int blocks_ = 0;
  std::vector<std::thread> threads_;

  absl::Mutex mutex_;
  std::deque<Filled> queue_ ABSL_GUARDED_BY(mutex_);
  std::vector<HugeBuffer> idle_ ABSL_GUARDED_BY(mutex_);
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_DIRECT_WRITER_H_
