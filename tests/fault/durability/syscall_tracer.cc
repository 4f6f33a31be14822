#include "tests/fault/durability/syscall_tracer.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <map>

#include "absl/strings/str_cat.h"

namespace modelstate::fault {

std::string SystemCall::ReadBytes(size_t argument, size_t size) const {
  std::string bytes(size, '\0');
  iovec local = {bytes.data(), size};
  iovec remote = {reinterpret_cast<void*>(arguments[argument]), size};
  const ssize_t n = process_vm_readv(process, &local, 1, &remote, 1, 0);
  bytes.resize(n < 0 ? 0 : static_cast<size_t>(n));
  return bytes;
}

std::string SystemCall::ReadText(size_t argument) const {
  // One read ends where the next page is not there, so short pieces never miss what is.
  std::string text;
  SystemCall at = *this;
  while (text.size() < 4096) {
    const std::string piece = at.ReadBytes(argument, 64 - at.arguments[argument] % 64);
    text += piece.substr(0, piece.find('\0'));
    if (piece.empty() || piece.find('\0') != std::string::npos) break;
    at.arguments[argument] += piece.size();
  }
  return text;
}

std::string SystemCall::DescriptorPath(size_t argument) const {
  const int fd = static_cast<int>(arguments[argument]);
  std::error_code error;
  return std::filesystem::read_symlink(fd == AT_FDCWD ? absl::StrCat("/proc/", process, "/cwd")
                                                      : absl::StrCat("/proc/", process, "/fd/", fd),
                                       error)
      .string();
}

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)

namespace {

const std::map<long, const char*>& FileCalls() {
  static const auto* const calls = new std::map<long, const char*>{
      {SYS_open, "open"},           {SYS_openat, "openat"},
      {SYS_openat2, "openat2"},     {SYS_creat, "creat"},
      {SYS_close, "close"},         {SYS_read, "read"},
      {SYS_pread64, "pread"},       {SYS_readv, "readv"},
      {SYS_preadv, "preadv"},       {SYS_preadv2, "preadv2"},
      {SYS_write, "write"},         {SYS_pwrite64, "pwrite"},
      {SYS_writev, "writev"},       {SYS_pwritev, "pwritev"},
      {SYS_pwritev2, "pwritev2"},   {SYS_fsync, "fsync"},
      {SYS_fdatasync, "fdatasync"}, {SYS_sync_file_range, "sync_file_range"},
      {SYS_syncfs, "syncfs"},       {SYS_ftruncate, "ftruncate"},
      {SYS_truncate, "truncate"},   {SYS_fallocate, "fallocate"},
      {SYS_stat, "stat"},           {SYS_lstat, "lstat"},
      {SYS_fstat, "fstat"},         {SYS_newfstatat, "fstatat"},
      {SYS_statx, "statx"},         {SYS_getdents64, "getdents"},
      {SYS_lseek, "lseek"},         {SYS_fcntl, "fcntl"},
      {SYS_mkdir, "mkdir"},         {SYS_mkdirat, "mkdirat"},
      {SYS_rename, "rename"},       {SYS_renameat, "renameat"},
      {SYS_renameat2, "renameat2"}, {SYS_link, "link"},
      {SYS_linkat, "linkat"},       {SYS_symlink, "symlink"},
      {SYS_symlinkat, "symlinkat"}, {SYS_unlink, "unlink"},
      {SYS_unlinkat, "unlinkat"},   {SYS_rmdir, "rmdir"},
      {SYS_access, "access"},       {SYS_faccessat2, "faccessat2"},
      {SYS_fadvise64, "fadvise"},   {SYS_copy_file_range, "copy_file_range"},
      {SYS_sendfile, "sendfile"},   {SYS_fchmod, "fchmod"}};
  return *calls;
}

// The next stop or end of `thread`, or of any with -1.
pid_t Wait(pid_t thread, int* status) {
  for (;;) {
    const pid_t stopped = waitpid(thread, status, __WALL);
    if (stopped >= 0 || errno != EINTR) return stopped;
  }
}

SystemCall FromRegisters(pid_t child, const user_regs_struct& r) {
  return {child,
          static_cast<long>(r.orig_rax),
          {r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9},
          static_cast<long>(r.rax)};
}

// Ends the process and all its threads.
int Kill(pid_t child) {
  kill(child, SIGKILL);
  int status = 0;
  while (Wait(-1, &status) > 0) {
  }
  return -1;
}

// What a thread is in the middle of.
struct Thread {
  bool inside = false;  // a call
  SystemCall call;
  Verdict verdict;
  user_regs_struct registers{};  // as they were before it
};

// Before a call: asks what becomes of it, and sees to that.
void Enter(pid_t id, Thread& thread, const Observer& observer) {
  ptrace(PTRACE_GETREGS, id, 0, &thread.registers);
  thread.call = FromRegisters(id, thread.registers);
  thread.verdict = observer.before(thread.call);
  user_regs_struct changed = thread.registers;
  if (thread.verdict.kind == Verdict::kFail) changed.orig_rax = ~0ULL;  // no such call
  if (thread.verdict.kind == Verdict::kShorten) changed.rdx = (changed.rdx + 1) / 2;
  if (thread.verdict.kind != Verdict::kRun) ptrace(PTRACE_SETREGS, id, 0, &changed);
}

void Leave(pid_t id, Thread& thread) {
  user_regs_struct returned;
  ptrace(PTRACE_GETREGS, id, 0, &returned);
  if (thread.verdict.kind != Verdict::kRun) {
    returned.rdx = thread.registers.rdx;
    if (thread.verdict.kind == Verdict::kFail) {
      returned.rax = static_cast<uint64_t>(-static_cast<int64_t>(thread.verdict.error_number));
    }
    ptrace(PTRACE_SETREGS, id, 0, &returned);
  }
  thread.call.result = static_cast<long>(returned.rax);
}

}  // namespace

bool TouchesFiles(const SystemCall& call) {
  if (!FileCalls().contains(call.number)) return false;
  const bool by_descriptor = call.number == SYS_read || call.number == SYS_write;
  return !by_descriptor || call.arguments[0] > 2;
}

bool IsWrite(const SystemCall& call) {
  return call.number == SYS_pwrite64 || call.number == SYS_write;
}
bool IsRead(const SystemCall& call) {
  return call.number == SYS_pread64 || call.number == SYS_read;
}
bool IsSync(const SystemCall& call) {
  return call.number == SYS_fdatasync || call.number == SYS_fsync;
}

std::string CallName(const SystemCall& call) {
  const auto it = FileCalls().find(call.number);
  return it == FileCalls().end() ? absl::StrCat("call ", call.number) : it->second;
}

int RunTraced(const std::function<int()>& body, const Observer& observer) {
  const pid_t child = fork();
  if (child < 0) return -1;
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    _exit(body());
  }
  int status = 0;
  Wait(child, &status);
  ptrace(PTRACE_SETOPTIONS, child, 0,
         PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACECLONE);
  ptrace(PTRACE_SYSCALL, child, 0, 0);
  std::map<pid_t, Thread> threads;
  for (pid_t id = 0; (id = Wait(-1, &status)) > 0;) {
    if (!WIFSTOPPED(status)) {
      threads.erase(id);
      if (id == child) return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
      continue;
    }
    int signal = 0;
    if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
      Thread& thread = threads[id];
      thread.inside = !thread.inside;
      if (thread.inside) {
        Enter(id, thread, observer);
        if (thread.call.number == SYS_io_uring_setup) {
          ADD_FAILURE() << "what is traced makes an io_uring, whose calls are not seen";
          return Kill(child);
        }
        if (thread.verdict.kind == Verdict::kKill) return Kill(child);
      } else {
        Leave(id, thread);
        if (observer.after && observer.after(thread.call)) return Kill(child);
      }
    } else if (status >> 16 == 0 && (threads.contains(id) || WSTOPSIG(status) != SIGSTOP)) {
      signal = WSTOPSIG(status);  // not a new thread's first stop
    }
    ptrace(PTRACE_SYSCALL, id, 0, signal);
  }
  return -1;
}

bool CanTrace() {
  return RunTraced([] { return 7; }, {[](const SystemCall&) { return Verdict(); }, nullptr}) == 7;
}

#else

// A ThreadSanitizer process cannot fork and go on.
bool TouchesFiles(const SystemCall&) { return false; }
bool IsWrite(const SystemCall&) { return false; }
bool IsRead(const SystemCall&) { return false; }
bool IsSync(const SystemCall&) { return false; }
std::string CallName(const SystemCall&) { return ""; }
int RunTraced(const std::function<int()>&, const Observer&) { return -1; }
bool CanTrace() { return false; }

#endif

}  // namespace modelstate::fault
