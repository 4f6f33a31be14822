#ifndef MODELSTATE_BENCH_READ_FILE_H_
#define MODELSTATE_BENCH_READ_FILE_H_

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "absl/types/span.h"

namespace modelstate {

// Reads all of a file into `to`, in pieces that threads take in turn; each is given to `use` by the
// thread that has read it.
template <size_t kPiece = size_t{8} << 20, typename Use>
void ReadWith(unsigned threads, int fd, uint8_t* to, size_t size, Use use) {
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([=] {
      for (size_t begin = t * kPiece; begin < size; begin += threads * kPiece) {
        const size_t piece = std::min(kPiece, size - begin);
        // O_DIRECT wants whole sectors; the file ends before the last of them.
        const size_t asked = (piece + 4095) / 4096 * 4096;
        if (pread(fd, to + begin, asked, static_cast<off_t>(begin)) !=
            static_cast<ssize_t>(piece)) {
          std::abort();
        }
        use(absl::MakeConstSpan(to + begin, piece));
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

inline void ReadWith(unsigned threads, int fd, uint8_t* to, size_t size) {
  ReadWith(threads, fd, to, size, [](absl::Span<const uint8_t>) {});
}

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_READ_FILE_H_
