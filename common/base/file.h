#ifndef MODELSTATE_COMMON_BASE_FILE_H_
#define MODELSTATE_COMMON_BASE_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace modelstate {

// An open file descriptor; closed with the object. Move-only. Positioned reads and writes of
// different ranges may run at the same time; otherwise thread-compatible.
class File {
 public:
  File() = default;
  // Takes over `fd`. `name` is what messages call the file.
  File(int fd, std::string name);
  ~File();
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;

  bool is_open() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  const std::string& name() const { return name_; }

  // Bytes, as fstat says now.
  absl::StatusOr<uint64_t> Size() const;

  // Fills all of `out` from `offset`. DATA_LOSS CHECKPOINT_CORRUPT when the file ends before.
  absl::Status ReadAt(uint64_t offset, absl::Span<uint8_t> out) const;
  // Writes all of `data` at `offset`; goes on after short writes and EINTR, and through the page
  // cache where O_DIRECT does not take it.
  absl::Status WriteAt(uint64_t offset, absl::Span<const uint8_t> data) const;
  // fdatasync. An error means that the data may be lost: it is never to be retried on this file.
  absl::Status SyncData() const;
  absl::Status Truncate(uint64_t size) const;
  // Makes the file `size` bytes long with room for all of them, where the file system can tell
  // beforehand; else does nothing. STORAGE_FULL.
  absl::Status Allocate(uint64_t size) const;
  // Writes go past the page cache from here on (O_DIRECT), where the file system has that.
  void TryDirect() const;

 private:
  int fd_ = -1;
  std::string name_;
};

// Opens a path of the caller's own choosing, for command-line tools and tests.
absl::StatusOr<File> OpenForRead(const std::string& path);
// `name` is what messages call the file; empty: by its path.
absl::StatusOr<File> CreateForWrite(const std::string& path, const std::string& name = "");
// Puts a file of these pieces in the place of `path` in one rename, after its bytes are synced;
// then syncs the folder. On failure what was there stays, and nothing else is left.
absl::Status ReplaceFile(const std::string& path,
                         absl::Span<const absl::Span<const uint8_t>> pieces);
// Makes a rename in the folder of `path` last.
absl::Status SyncFolderOf(const std::string& path);

// A directory that nothing leads out of: every path is relative to it, and the kernel refuses `..`,
// absolute paths and symbolic links (openat2 with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS; the path
// that Open takes is the caller's own and may have them). Hard links are files like others. Errors
// name paths relative to the root only: INVALID_ARGUMENT INVALID_FIELD for a path that leaves it or
// is no regular file or directory, NOT_FOUND CHECKPOINT_NOT_FOUND where there is nothing.
// Thread-safe.
class RootDirectory {
 public:
  struct Entry {
    std::string name;  // last part
    bool is_directory = false;
    bool leads_out = false;  // a symbolic link to outside of the root: neither file nor directory
    uint64_t size = 0;       // bytes; 0 for directories
    absl::Time modified;
  };

  static absl::StatusOr<RootDirectory> Open(const std::string& path);

  RootDirectory(RootDirectory&&) noexcept = default;
  RootDirectory& operator=(RootDirectory&&) noexcept = default;

  // Refuses what is empty, absolute, has `..`, `//`, a NUL or a part over 255 bytes; "." is the
  // root.
  static absl::Status ValidatePath(absl::string_view path);

  // The directory `path` as a root of its own, which it stays when its name is taken away from it.
  absl::StatusOr<RootDirectory> OpenDirectory(const std::string& path) const;
  // Whether this directory is what `path` of `root` names now.
  bool IsAt(const RootDirectory& root, const std::string& path) const;
  // Locks it against other processes and objects (flock) until this object ends. False where
  // another holds the lock; true also where the file system has no locks.
  bool TryLock() const;

  absl::StatusOr<File> OpenFile(const std::string& path) const;    // regular files only
  absl::StatusOr<File> CreateFile(const std::string& path) const;  // must not exist; 0640
  absl::StatusOr<Entry> Stat(const std::string& path) const;
  // By name. Of symbolic links those that lead out; others mean what has a name of its own.
  absl::StatusOr<std::vector<Entry>> List(const std::string& path) const;
  absl::Status MakeDirectory(const std::string& path) const;    // parent must exist
  absl::Status MakeDirectories(const std::string& path) const;  // and parents; existing is fine
  // rename(2); with `exchange` both exist and swap places in one step (RENAME_EXCHANGE); without it
  // an existing target is CHECKPOINT_EXISTS (RENAME_NOREPLACE).
  absl::Status Rename(const std::string& from, const std::string& to, bool exchange) const;
  absl::Status SyncDirectory(const std::string& path) const;
  absl::Status RemoveRecursively(const std::string& path) const;
  absl::Status RemoveDirectory(const std::string& path) const;  // must be empty

 private:
  explicit RootDirectory(File root) : root_(std::move(root)) {}

  File root_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_FILE_H_
