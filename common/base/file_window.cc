#include "common/base/file_window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr uint64_t kPage = 4096;
// What is less is not worth a way past the cache.
constexpr uint64_t kLeastDirect = uint64_t{256} << 10;

uint64_t DownToPage(uint64_t offset) { return offset / kPage * kPage; }

// What the page cache drops or reads ahead is seldom less.
constexpr uint64_t kProbeStep = uint64_t{256} << 10;
// Of what is cached no window is kept, so more of it can be looked at once.
constexpr uint64_t kMaxCached = uint64_t{16} << 20;

// Whether the page cache has the range, by a page here and there: to ask for each takes a fifth of
// the time of the read. Also true where it cannot tell. A read with RWF_NOWAIT would tell too, but
// has the kernel read ahead what is missing.
bool IsCached(const File& file, uint64_t begin, uint64_t end) {
  const size_t size = end - begin;
  void* map = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd(), static_cast<off_t>(begin));
  if (map == MAP_FAILED) return true;
  const auto has = [map](uint64_t at) {
    unsigned char page = 1;
    return mincore(static_cast<uint8_t*>(map) + at, 1, &page) != 0 || (page & 1) != 0;
  };
  bool cached = has(DownToPage(size - 1));
  for (uint64_t at = 0; cached && at < size; at += kProbeStep) cached = has(at);
  munmap(map, size);
  return cached;
}

}  // namespace

absl::Status FileWindow::ReadAt(const File& file, uint64_t offset, absl::Span<uint8_t> out,
                                uint64_t end) {
  if (&file != file_) {
    file_ = &file;
    begin_ = end_ = 0;
    state_ = kUntried;
  }
  end = std::max(end, offset + out.size());
  while (!out.empty()) {
    if (offset < begin_ || offset >= end_) MS_RETURN_IF_ERROR(Fill(offset, end));
    const uint64_t size = std::min<uint64_t>(out.size(), end_ - offset);
    if (cached_) {
      MS_RETURN_IF_ERROR(file.ReadAt(offset, out.subspan(0, size)));
    } else {
      std::memcpy(out.data(), memory_.data() + (offset - begin_), size);
    }
    offset += size;
    out.remove_prefix(size);
  }
  return absl::OkStatus();
}

absl::Status FileWindow::Fill(uint64_t offset, uint64_t end) {
  begin_ = DownToPage(offset);
  end_ = std::min(end, begin_ + kMaxCached);
  cached_ = true;
  if (state_ == kNone || end_ - begin_ < kLeastDirect || IsCached(*file_, begin_, end_)) {
    return absl::OkStatus();
  }
  if (end_ > begin_ + capacity_) {
    end_ = begin_ + capacity_;
    if (IsCached(*file_, begin_, end_)) return absl::OkStatus();
  }
  if (state_ == kUntried) {
    // A descriptor with flags of its own.
    const std::string path = absl::StrCat("/proc/self/fd/", file_->fd());
    direct_ = File(open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC | O_NOCTTY), file_->name());
    state_ = direct_.is_open() ? kDirect : kNone;
  }
  if (memory_.data() == nullptr && state_ == kDirect) {
    memory_ = HugeBuffer(capacity_);
    if (memory_.data() == nullptr) state_ = kNone;
  }
  if (state_ == kNone) return absl::OkStatus();
  const uint64_t want = DownToPage(end_ - begin_ + kPage - 1);
  ssize_t n = 0;
  do {
    n = pread(direct_.fd(), memory_.data(), want, static_cast<off_t>(begin_));
  } while (n < 0 && errno == EINTR);
  if (n < 0 && errno == EINVAL) {
    state_ = kNone;
    return absl::OkStatus();
  }
  if (n < 0) {
    end_ = begin_;
    return ErrnoError(errno, absl::StrCat("read ", direct_.name()));
  }
  // Where the file ends before `offset`, a plain read says so.
  if (begin_ + static_cast<uint64_t>(n) <= offset) return absl::OkStatus();
  end_ = std::min(end_, begin_ + static_cast<uint64_t>(n));
  cached_ = false;
  return absl::OkStatus();
}

}  // namespace modelstate
