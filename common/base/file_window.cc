#include "common/base/file_window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr uint64_t kPage = 4096;
// What is less is not worth a way past the cache.
constexpr uint64_t kLeastDirect = uint64_t{256} << 10;

uint64_t DownToPage(uint64_t offset) { return offset / kPage * kPage; }

// Whether the page cache has all of the range, or cannot tell. A read with RWF_NOWAIT would tell
// too, but has the kernel read ahead what is missing.
bool IsCached(const File& file, uint64_t begin, uint64_t end) {
  const size_t size = end - begin;
  void* map = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd(), static_cast<off_t>(begin));
  if (map == MAP_FAILED) return true;
  std::vector<unsigned char> resident((size + kPage - 1) / kPage);
  const bool told = mincore(map, size, resident.data()) == 0;
  munmap(map, size);
  return !told || std::all_of(resident.begin(), resident.end(),
                              [](unsigned char page) { return (page & 1) != 0; });
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
      std::memcpy(out.data(), memory_.get() + (offset - begin_), size);
    }
    offset += size;
    out.remove_prefix(size);
  }
  return absl::OkStatus();
}

absl::Status FileWindow::Fill(uint64_t offset, uint64_t end) {
  begin_ = DownToPage(offset);
  end_ = std::min(end, begin_ + capacity_);
  cached_ = true;
  if (state_ == kNone || end_ - begin_ < kLeastDirect || IsCached(*file_, begin_, end_)) {
    return absl::OkStatus();
  }
  if (state_ == kUntried) {
    // A descriptor with flags of its own.
    const std::string path = absl::StrCat("/proc/self/fd/", file_->fd());
    direct_ = File(open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC | O_NOCTTY), file_->name());
    state_ = direct_.is_open() ? kDirect : kNone;
  }
  if (memory_ == nullptr && state_ == kDirect) {
    constexpr size_t kHugePage = size_t{2} << 20;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, capacity_)));
    if (memory_ == nullptr) state_ = kNone;
    madvise(memory_.get(), capacity_, MADV_HUGEPAGE);
  }
  if (state_ == kNone) return absl::OkStatus();
  const uint64_t want = DownToPage(end_ - begin_ + kPage - 1);
  ssize_t n = 0;
  do {
    n = pread(direct_.fd(), memory_.get(), want, static_cast<off_t>(begin_));
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
