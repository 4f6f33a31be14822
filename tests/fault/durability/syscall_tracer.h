#ifndef MODELSTATE_TESTS_FAULT_DURABILITY_SYSCALL_TRACER_H_
#define MODELSTATE_TESTS_FAULT_DURABILITY_SYSCALL_TRACER_H_

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace modelstate::fault {

// One system call of a traced process.
struct SystemCall {
  pid_t process = 0;  // the thread, by which the memory and files of its process are found too
  long number = 0;
  std::array<uint64_t, 6> arguments{};
  long result = 0;  // -errno for an error; of calls that have returned

  // What an argument points to.
  std::string ReadText(size_t argument) const;
  std::string ReadBytes(size_t argument, size_t size) const;
  // What a descriptor of the process is open on, or its working directory for AT_FDCWD.
  std::string DescriptorPath(size_t argument) const;
};

// Whether a call acts on files, directories or descriptors of them, other than the standard ones.
bool TouchesFiles(const SystemCall& call);
bool IsWrite(const SystemCall& call);
bool IsRead(const SystemCall& call);
bool IsSync(const SystemCall& call);
std::string CallName(const SystemCall& call);

// What becomes of a call that is about to be made.
struct Verdict {
  enum Kind { kRun, kKill, kFail, kShorten } kind = kRun;
  int error_number = 0;  // kFail: the call is not made, and returns this
};

struct Observer {
  // Before a call; kShorten halves the third argument, which is the count of reads and writes.
  std::function<Verdict(const SystemCall&)> before;
  // After it; true kills the process. Optional.
  std::function<bool(const SystemCall&)> after;
};

// Runs `body` in a child process under ptrace until its end or its death, with the threads that it
// makes: their calls come one at a time, in no order but that in which they are made. The exit
// status, which `body` returns, or -1 where it was killed. A `body` that uses io_uring, whose calls
// would not be seen, fails the test.
int RunTraced(const std::function<int()>& body, const Observer& observer);

// Whether this machine lets tests trace their children, on an architecture that RunTraced knows.
bool CanTrace();

}  // namespace modelstate::fault

#endif  // MODELSTATE_TESTS_FAULT_DURABILITY_SYSCALL_TRACER_H_
