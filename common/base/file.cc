#include "common/base/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

// What one read(2) or write(2) moves at most on Linux.
constexpr size_t kMaxTransfer = 0x7ffff000;
constexpr uint64_t kMaxOffset = std::numeric_limits<int64_t>::max();
constexpr int kMaxRemoveDepth = 128;

std::string Quoted(absl::string_view path) {
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(path.substr(0, 300)), "\"");
}

// A path that cannot be used, from the errno of an open or a stat below the root.
absl::Status PathError(int error_number, absl::string_view what, absl::string_view path) {
  switch (error_number) {
    case ENOTDIR:
      return MakeError(Reason::kCheckpointNotFound,
                       absl::StrCat(Quoted(path),
                                    " is, or goes through, a file where a directory is needed; "
                                    "list the directory that it is in"),
                       {{"path", std::string(path)}});
    case ENOENT:
      return MakeError(
          Reason::kCheckpointNotFound,
          absl::StrCat("there is no ", Quoted(path), "; list the directory that it is in"),
          {{"path", std::string(path)}});
    case EXDEV:
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("path ", Quoted(path),
                                    " leads out of its root directory; copy the files under it"),
                       {{"path", std::string(path)}});
    case ELOOP:
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("path ", Quoted(path),
                                    " goes through a symbolic link, which is refused below a root "
                                    "directory, or through one that leads to itself; copy the "
                                    "files there, or hard-link them"),
                       {{"path", std::string(path)}});
    case ENXIO:
      return MakeError(Reason::kInvalidField,
                       absl::StrCat(Quoted(path), " is no regular file or directory"),
                       {{"path", std::string(path)}});
    case EEXIST:
      return MakeError(Reason::kCheckpointExists,
                       absl::StrCat(Quoted(path), " exists already; choose another name"),
                       {{"path", std::string(path)}});
    case ENOSYS:
      return MakeError(Reason::kStorageError,
                       "the kernel or a seccomp filter does not offer openat2(2), without which "
                       "paths cannot be kept inside their root; run on Linux 5.6 or newer and "
                       "allow the call");
    default:
      return ErrnoError(error_number, absl::StrCat(what, " ", Quoted(path)));
  }
}

// A descriptor below `root`, or -1 and errno. Links are refused wherever they lead: who may write
// below the root is not trusted to say what else the server reads.
int OpenBeneath(int root, const std::string& path, int flags, mode_t mode = 0,
                uint64_t resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) {
  open_how how = {};
  // openat2 is strict: O_PATH goes with few other flags.
  how.flags = static_cast<uint64_t>(flags | O_CLOEXEC | ((flags & O_PATH) != 0 ? 0 : O_NOCTTY));
  how.mode = mode;
  how.resolve = resolve;
  // EAGAIN: something was renamed while the kernel walked a "..".
  for (int attempt = 0;; ++attempt) {
    const long fd = syscall(SYS_openat2, root, path.c_str(), &how, sizeof(how));
    if (fd >= 0 || attempt >= 16 || (errno != EAGAIN && errno != EINTR)) {
      return static_cast<int>(fd);
    }
  }
}

struct Place {
  File parent;
  std::string name;
};

// The directory that holds the last part of `path`, for calls that act on a name in a directory.
absl::StatusOr<Place> OpenParent(int root, const std::string& path, absl::string_view what) {
  MS_RETURN_IF_ERROR(RootDirectory::ValidatePath(path));
  if (path == ".") {
    return MakeError(Reason::kInvalidField, absl::StrCat("cannot ", what, " the root directory"));
  }
  const size_t slash = path.rfind('/');
  const std::string parent = slash == std::string::npos ? "." : path.substr(0, slash);
  const int fd = OpenBeneath(root, parent, O_RDONLY | O_DIRECTORY);
  if (fd < 0) return PathError(errno, absl::StrCat(what, " ", Quoted(path), " below"), parent);
  return Place{File(fd, parent), slash == std::string::npos ? path : path.substr(slash + 1)};
}

absl::Status CheckRegular(int fd, absl::string_view path) {
  struct stat info;
  if (fstat(fd, &info) != 0) return ErrnoError(errno, absl::StrCat("stat ", Quoted(path)));
  if (S_ISREG(info.st_mode)) return absl::OkStatus();
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat(Quoted(path), S_ISDIR(info.st_mode)
                                     ? " is a directory, not a regular file; name a file"
                                     : " is not a regular file; copy it to one"),
      {{"path", std::string(path)}});
}

// Names in a directory without "." and "..".
absl::StatusOr<std::vector<std::string>> ReadNames(int directory, absl::string_view path) {
  const int copy = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (copy < 0) return ErrnoError(errno, absl::StrCat("list ", Quoted(path)));
  DIR* stream = fdopendir(copy);
  if (stream == nullptr) {
    const int error_number = errno;
    close(copy);
    return ErrnoError(error_number, absl::StrCat("list ", Quoted(path)));
  }
  absl::Cleanup closer = [stream] { closedir(stream); };
  std::vector<std::string> names;
  errno = 0;
  while (const dirent* entry = readdir(stream)) {
    const absl::string_view name = entry->d_name;
    if (name != "." && name != "..") names.emplace_back(name);
    errno = 0;
  }
  if (errno != 0) return ErrnoError(errno, absl::StrCat("list ", Quoted(path)));
  std::sort(names.begin(), names.end());
  return names;
}

absl::Status RemoveBelow(int directory, const std::string& name, const std::string& path,
                         int depth) {
  if (unlinkat(directory, name.c_str(), 0) == 0) return absl::OkStatus();
  if (errno != EISDIR && errno != EPERM) return PathError(errno, "remove", path);
  if (depth > kMaxRemoveDepth) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("cannot remove ", Quoted(path), ": directories are nested over ",
                                  kMaxRemoveDepth, " deep"));
  }
  const int fd = openat(directory, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return PathError(errno, "remove", path);
  const File inner(fd, path);
  MS_ASSIGN_OR_RETURN(const std::vector<std::string> names, ReadNames(fd, path));
  for (const std::string& child : names) {
    MS_RETURN_IF_ERROR(RemoveBelow(fd, child, absl::StrCat(path, "/", child), depth + 1));
  }
  if (unlinkat(directory, name.c_str(), AT_REMOVEDIR) != 0) return PathError(errno, "remove", path);
  return absl::OkStatus();
}

void LeaveDirect(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags >= 0) fcntl(fd, F_SETFL, flags & ~O_DIRECT);
}

bool LeadsOut(int root, const std::string& link) {
  const int fd = OpenBeneath(root, link, O_PATH, 0, RESOLVE_BENEATH);
  if (fd < 0) return errno == EXDEV;
  close(fd);
  return false;
}

RootDirectory::Entry MakeEntry(std::string name, const struct stat& info) {
  RootDirectory::Entry entry;
  entry.name = std::move(name);
  entry.is_directory = S_ISDIR(info.st_mode);
  entry.leads_out = S_ISLNK(info.st_mode);
  entry.size = S_ISREG(info.st_mode) ? static_cast<uint64_t>(info.st_size) : 0;
  entry.modified = absl::TimeFromTimespec(info.st_mtim);
  return entry;
}

}  // namespace

File::File(int fd, std::string name) : fd_(fd), name_(std::move(name)) {}

File::~File() {
  if (fd_ >= 0) close(fd_);
}

File::File(File&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), name_(std::move(other.name_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(name_, other.name_);
  return *this;
}

absl::StatusOr<uint64_t> File::Size() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) return ErrnoError(errno, absl::StrCat("stat ", name_));
  return static_cast<uint64_t>(info.st_size);
}

absl::Status File::ReadAt(uint64_t offset, absl::Span<uint8_t> out) const {
  size_t done = 0;
  while (done < out.size()) {
    ssize_t n = 0;
    if (offset <= kMaxOffset - done) {
      n = pread(fd_, out.data() + done, std::min(out.size() - done, kMaxTransfer),
                static_cast<off_t>(offset + done));
    }
    if (n < 0) {
      if (errno == EINTR) continue;
      return ErrnoError(errno, absl::StrCat("read ", name_));
    }
    if (n == 0) {
      return MakeError(Reason::kCheckpointCorrupt,
                       absl::StrCat("file ", name_, " ends before byte ", offset, " + ", out.size(),
                                    ": it is truncated or changed while it was read"));
    }
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status File::WriteAt(uint64_t offset, absl::Span<const uint8_t> data) const {
  size_t done = 0;
  bool left_direct = false;
  while (done < data.size()) {
    if (offset > kMaxOffset - done) return ErrnoError(EFBIG, absl::StrCat("write ", name_));
    const ssize_t n = pwrite(fd_, data.data() + done, std::min(data.size() - done, kMaxTransfer),
                             static_cast<off_t>(offset + done));
    if (n < 0) {
      if (errno == EINTR) continue;
      // Once, whatever the descriptor's flags are by now: another thread may just have changed
      // them.
      if (errno == EINVAL && !left_direct) {
        left_direct = true;
        LeaveDirect(fd_);
        continue;
      }
      return ErrnoError(errno, absl::StrCat("write ", name_));
    }
    if (n == 0) return ErrnoError(ENOSPC, absl::StrCat("write ", name_));
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status File::SyncData() const {
  // Never retried, not even on EINTR: the kernel may have marked the pages clean.
  if (fdatasync(fd_) != 0) return ErrnoError(errno, absl::StrCat("sync ", name_));
  return absl::OkStatus();
}

absl::Status File::Truncate(uint64_t size) const {
  if (size > kMaxOffset) return ErrnoError(EFBIG, absl::StrCat("resize ", name_));
  while (ftruncate(fd_, static_cast<off_t>(size)) != 0) {
    if (errno != EINTR) return ErrnoError(errno, absl::StrCat("resize ", name_));
  }
  return absl::OkStatus();
}

absl::Status File::Allocate(uint64_t size) const {
  if (size == 0) return absl::OkStatus();
  if (size > kMaxOffset) return ErrnoError(EFBIG, absl::StrCat("allocate ", name_));
  while (fallocate(fd_, 0, 0, static_cast<off_t>(size)) != 0) {
    if (errno == EOPNOTSUPP || errno == ENOSYS) break;
    if (errno != EINTR) return ErrnoError(errno, absl::StrCat("allocate ", name_));
  }
  return absl::OkStatus();
}

void File::TryDirect() const {
  // Opening with the flag would leave an empty file where there is no O_DIRECT.
  const int flags = fcntl(fd_, F_GETFL);
  if (flags >= 0) fcntl(fd_, F_SETFL, flags | O_DIRECT);
}

absl::StatusOr<File> OpenForRead(const std::string& path) {
  // O_NONBLOCK: opening a FIFO returns at once, and is then refused.
  const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (fd < 0) return PathError(errno, "open", path);
  File file(fd, path);
  MS_RETURN_IF_ERROR(CheckRegular(fd, path));
  return file;
}

absl::StatusOr<File> CreateForWrite(const std::string& path, const std::string& name) {
  const std::string& shown = name.empty() ? path : name;
  const int fd =
      open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0640);
  if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) {
    return MakeError(
        Reason::kCheckpointNotFound,
        absl::StrCat("there is no folder for ", Quoted(shown), "; make it, or give another path"),
        {{"path", shown}});
  }
  if (fd < 0) return PathError(errno, "create", shown);
  File file(fd, shown);
  MS_RETURN_IF_ERROR(CheckRegular(fd, shown));
  return file;
}

absl::Status ReplaceFile(const std::string& path,
                         absl::Span<const absl::Span<const uint8_t>> pieces) {
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  unlink(temporary.c_str());
  auto remove = absl::MakeCleanup([&temporary] { unlink(temporary.c_str()); });
  {
    MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(temporary));
    uint64_t offset = 0;
    for (absl::Span<const uint8_t> piece : pieces) {
      MS_RETURN_IF_ERROR(file.WriteAt(offset, piece));
      offset += piece.size();
    }
    MS_RETURN_IF_ERROR(file.SyncData());
  }
  if (std::rename(temporary.c_str(), path.c_str()) != 0) return PathError(errno, "rename", path);
  std::move(remove).Cancel();
  return SyncFolderOf(path);
}

absl::Status SyncFolderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return PathError(errno, "open directory", folder);
  const File closer(fd, folder);
  if (fsync(fd) != 0) return PathError(errno, "sync", folder);
  return absl::OkStatus();
}

absl::StatusOr<RootDirectory> RootDirectory::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return PathError(errno, "open directory", path);
  File root(fd, path);
  // Tells a kernel without openat2 now instead of at the first request.
  const int probe = OpenBeneath(fd, ".", O_PATH | O_DIRECTORY);
  if (probe < 0) return PathError(errno, "open directory", path);
  close(probe);
  return RootDirectory(std::move(root));
}

absl::Status RootDirectory::ValidatePath(absl::string_view path) {
  absl::string_view problem;
  if (path.empty()) {
    problem = "is empty";
  } else if (path.front() == '/') {
    problem = "is absolute";
  } else if (path.find('\0') != absl::string_view::npos) {
    problem = "has a NUL";
  } else if (path.size() >= 4096) {
    problem = "is longer than 4095 bytes";
  } else if (path != ".") {
    for (absl::string_view part : absl::StrSplit(path, '/')) {
      if (part.empty()) problem = "has an empty part";
      if (part == "." || part == "..") problem = "has a \".\" or \"..\" part";
      if (part.size() > 255) problem = "has a part over 255 bytes";
    }
  }
  if (problem.empty()) return absl::OkStatus();
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("path ", Quoted(path), " ", problem,
                                "; give a path relative to the root directory, such as "
                                "\"resnet50/step-100\""),
                   {{"path", std::string(path.substr(0, 256))}});
}

absl::StatusOr<File> RootDirectory::OpenFile(const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  const int fd = OpenBeneath(root_.fd(), path, O_RDONLY | O_NONBLOCK);
  if (fd < 0) return PathError(errno, "open", path);
  File file(fd, path);
  MS_RETURN_IF_ERROR(CheckRegular(fd, path));
  return file;
}

absl::StatusOr<File> RootDirectory::CreateFile(const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  const int fd = OpenBeneath(root_.fd(), path, O_RDWR | O_CREAT | O_EXCL, 0640);
  if (fd < 0) return PathError(errno, "create", path);
  return File(fd, path);
}

absl::StatusOr<RootDirectory::Entry> RootDirectory::Stat(const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  const int fd = OpenBeneath(root_.fd(), path, O_PATH);
  if (fd < 0) return PathError(errno, "stat", path);
  const File file(fd, path);
  struct stat info;
  if (fstat(fd, &info) != 0) return PathError(errno, "stat", path);
  if (!S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode)) return PathError(ENXIO, "stat", path);
  const size_t slash = path.rfind('/');
  return MakeEntry(slash == std::string::npos ? path : path.substr(slash + 1), info);
}

absl::StatusOr<std::vector<RootDirectory::Entry>> RootDirectory::List(
    const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  const int fd = OpenBeneath(root_.fd(), path, O_RDONLY | O_DIRECTORY);
  if (fd < 0) return PathError(errno, "list", path);
  const File directory(fd, path);
  MS_ASSIGN_OR_RETURN(std::vector<std::string> names, ReadNames(fd, path));
  std::vector<Entry> entries;
  for (std::string& name : names) {
    struct stat info;
    if (fstatat(fd, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;  // removed meanwhile
      return PathError(errno, "stat", absl::StrCat(path, "/", name));
    }
    const bool listed = S_ISREG(info.st_mode) || S_ISDIR(info.st_mode) ||
                        (S_ISLNK(info.st_mode) && LeadsOut(root_.fd(), path + "/" + name));
    if (!listed) continue;
    entries.push_back(MakeEntry(std::move(name), info));
  }
  return entries;
}

absl::StatusOr<RootDirectory> RootDirectory::OpenDirectory(const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  const int fd = OpenBeneath(root_.fd(), path, O_RDONLY | O_DIRECTORY);
  if (fd < 0) return PathError(errno, "open directory", path);
  return RootDirectory(File(fd, path));
}

bool RootDirectory::IsAt(const RootDirectory& root, const std::string& path) const {
  const int fd = OpenBeneath(root.root_.fd(), path, O_PATH | O_DIRECTORY);
  if (fd < 0) return false;
  const File closer(fd, path);
  struct stat there;
  struct stat here;
  return fstat(fd, &there) == 0 && fstat(root_.fd(), &here) == 0 && there.st_dev == here.st_dev &&
         there.st_ino == here.st_ino;
}

bool RootDirectory::TryLock() const {
  int locked = 0;
  do {
    locked = flock(root_.fd(), LOCK_EX | LOCK_NB);
  } while (locked != 0 && errno == EINTR);
  return locked == 0 || errno != EWOULDBLOCK;
}

absl::Status RootDirectory::MakeDirectory(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const Place place, OpenParent(root_.fd(), path, "make"));
  if (mkdirat(place.parent.fd(), place.name.c_str(), 0750) != 0) {
    return PathError(errno, "make directory", path);
  }
  return absl::OkStatus();
}

absl::Status RootDirectory::MakeDirectories(const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  if (path == ".") return absl::OkStatus();
  for (size_t end = path.find('/');; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    const absl::Status made = MakeDirectory(part);
    if (!made.ok()) {
      if (GetReason(made) != Reason::kCheckpointExists) return made;
      MS_ASSIGN_OR_RETURN(const Entry entry, Stat(part));
      if (!entry.is_directory) {
        return MakeError(Reason::kInvalidField,
                         absl::StrCat(Quoted(part), " is a file, not a directory"));
      }
    }
    if (end == std::string::npos) return absl::OkStatus();
  }
}

absl::Status RootDirectory::Rename(const std::string& from, const std::string& to,
                                   bool exchange) const {
  MS_ASSIGN_OR_RETURN(const Place source, OpenParent(root_.fd(), from, "rename"));
  MS_ASSIGN_OR_RETURN(const Place target, OpenParent(root_.fd(), to, "rename"));
  if (renameat2(source.parent.fd(), source.name.c_str(), target.parent.fd(), target.name.c_str(),
                exchange ? RENAME_EXCHANGE : RENAME_NOREPLACE) == 0) {
    return absl::OkStatus();
  }
  switch (errno) {
    case EEXIST:
      return PathError(EEXIST, "rename", to);
    case ENOENT:
      return PathError(ENOENT, "rename", exchange ? to : from);
    default:
      return ErrnoError(errno, absl::StrCat("rename ", Quoted(from), " to ", Quoted(to)));
  }
}

absl::Status RootDirectory::SyncDirectory(const std::string& path) const {
  MS_RETURN_IF_ERROR(ValidatePath(path));
  const int fd = OpenBeneath(root_.fd(), path, O_RDONLY | O_DIRECTORY);
  if (fd < 0) return PathError(errno, "sync", path);
  const File directory(fd, path);
  if (fsync(fd) != 0) return ErrnoError(errno, absl::StrCat("sync directory ", Quoted(path)));
  return absl::OkStatus();
}

absl::Status RootDirectory::RemoveRecursively(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const Place place, OpenParent(root_.fd(), path, "remove"));
  return RemoveBelow(place.parent.fd(), place.name, path, 0);
}

absl::Status RootDirectory::RemoveDirectory(const std::string& path) const {
  MS_ASSIGN_OR_RETURN(const Place place, OpenParent(root_.fd(), path, "remove"));
  if (unlinkat(place.parent.fd(), place.name.c_str(), AT_REMOVEDIR) == 0) return absl::OkStatus();
  return PathError(errno, "remove", path);
}

}  // namespace modelstate
