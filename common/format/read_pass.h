#ifndef MODELSTATE_COMMON_FORMAT_READ_PASS_H_
#define MODELSTATE_COMMON_FORMAT_READ_PASS_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/file_window.h"

namespace modelstate {

// One thread's reading of tensors of a checkpoint, which outlives it: says before each piece
// whether it goes on, and keeps what was read ahead for the next. Thread-compatible.
class ReadPass {
 public:
  // Asked before each piece of at most CheckpointReader::kPieceBytes is read; what it returns ends
  // the read unless OK.
  using Gate = std::function<absl::Status()>;

  explicit ReadPass(
      Gate gate = [] { return absl::OkStatus(); }, uint64_t window_bytes = FileWindow::kMaxBytes)
      : gate_(std::move(gate)), window_(window_bytes) {}

  absl::Status GoOn() const { return gate_(); }

  // Tensors that follow one another up to `end` in their file will be read, in the order of it.
  void Expect(uint64_t end) { expected_end_ = end; }

  // As File::ReadAt; the tensor goes on to `end`.
  absl::Status ReadAt(const File& file, uint64_t offset, absl::Span<uint8_t> out, uint64_t end) {
    return window_.ReadAt(file, offset, out, std::max(end, expected_end_));
  }

 private:
  const Gate gate_;
  FileWindow window_;
  uint64_t expected_end_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_READ_PASS_H_
