// Makes ThreadSanitizer see the locks and completion queues of the system's Abseil and gRPC, which
// are not built with it: without this every access under an absl::Mutex looks like a race. Part of
// every executable that is built with -fsanitize=thread, and of no other.
//
// These definitions come before those of the shared libraries, also for calls from within libgrpc.
// Each calls the real function and says who has to wait for whom. Not for lock order: that is left
// to Abseil's own check in debug builds.

#include <dlfcn.h>
#include <grpc/grpc.h>

#include <cstdio>
#include <cstdlib>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace {

#define MODELSTATE_STRING_OF(x) #x
#define MODELSTATE_STRING(x) MODELSTATE_STRING_OF(x)

// Mangled names begin with the length of the inline namespace that the package was built with.
constexpr char kNamespace[] = MODELSTATE_STRING(ABSL_OPTION_INLINE_NAMESPACE_NAME);

template <typename Function>
Function* Find(const char* symbol) {
  void* found = dlsym(RTLD_NEXT, symbol);
  if (found == nullptr) {
    std::fprintf(stderr, "tsan_sync: %s is in no shared library\n", symbol);
    std::abort();
  }
  return reinterpret_cast<Function*>(found);
}

template <typename Function>
Function* FindAbsl(const char* rest) {
  char symbol[256];
  std::snprintf(symbol, sizeof(symbol), "_ZN4absl%zu%s%s", sizeof(kNamespace) - 1, kNamespace,
                rest);
  return Find<Function>(symbol);
}

// A waiter's condition is evaluated by whichever thread unlocks, after it said that it lets go.
class IgnoreConditionReads {
 public:
  IgnoreConditionReads() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~IgnoreConditionReads() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static const auto real = FindAbsl<void(Mutex*)>("5Mutex4LockEv");
  real(this);
  __tsan_acquire(this);
}

bool Mutex::TryLock() {
  static const auto real = FindAbsl<bool(Mutex*)>("5Mutex7TryLockEv");
  if (!real(this)) return false;
  __tsan_acquire(this);
  return true;
}

void Mutex::Unlock() {
  static const auto real = FindAbsl<void(Mutex*)>("5Mutex6UnlockEv");
  __tsan_release(this);
  IgnoreConditionReads ignore;
  real(this);
}

void Mutex::ReaderLock() {
  static const auto real = FindAbsl<void(Mutex*)>("5Mutex10ReaderLockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static const auto real = FindAbsl<void(Mutex*)>("5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  IgnoreConditionReads ignore;
  real(this);
}

void Mutex::LockWhen(const Condition& condition) {
  static const auto real =
      FindAbsl<void(Mutex*, const Condition&)>("5Mutex8LockWhenERKNS0_9ConditionE");
  {
    IgnoreConditionReads ignore;
    real(this, condition);
  }
  __tsan_acquire(this);
}

void Mutex::Await(const Condition& condition) {
  static const auto real =
      FindAbsl<void(Mutex*, const Condition&)>("5Mutex5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  {
    IgnoreConditionReads ignore;
    real(this, condition);
  }
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static const auto real = FindAbsl<bool(Mutex*, const Condition&, Duration)>(
      "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  bool result = false;
  {
    IgnoreConditionReads ignore;
    result = real(this, condition, timeout);
  }
  __tsan_acquire(this);
  return result;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static const auto real = FindAbsl<bool(Mutex*, const Condition&, Time)>(
      "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  __tsan_release(this);
  bool result = false;
  {
    IgnoreConditionReads ignore;
    result = real(this, condition, deadline);
  }
  __tsan_acquire(this);
  return result;
}

void CondVar::Wait(Mutex* mutex) {
  static const auto real = FindAbsl<void(CondVar*, Mutex*)>("7CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mutex);
  {
    IgnoreConditionReads ignore;
    real(this, mutex);
  }
  __tsan_acquire(mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static const auto real = FindAbsl<bool(CondVar*, Mutex*, Duration)>(
      "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  __tsan_release(mutex);
  bool result = false;
  {
    IgnoreConditionReads ignore;
    result = real(this, mutex, timeout);
  }
  __tsan_acquire(mutex);
  return result;
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static const auto real =
      FindAbsl<bool(CondVar*, Mutex*, Time)>("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  __tsan_release(mutex);
  bool result = false;
  {
    IgnoreConditionReads ignore;
    result = real(this, mutex, deadline);
  }
  __tsan_acquire(mutex);
  return result;
}

ABSL_NAMESPACE_END
}  // namespace absl

// What was done before a batch was started happened before its tag came back.
extern "C" {

grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t count, void* tag,
                                      void* reserved) {
  static const auto real = Find<grpc_call_error(grpc_call*, const grpc_op*, size_t, void*, void*)>(
      "grpc_call_start_batch");
  __tsan_release(call);
  __tsan_release(tag);
  return real(call, ops, count, tag, reserved);
}

grpc_event grpc_completion_queue_next(grpc_completion_queue* queue, gpr_timespec deadline,
                                      void* reserved) {
  static const auto real =
      Find<grpc_event(grpc_completion_queue*, gpr_timespec, void*)>("grpc_completion_queue_next");
  const grpc_event event = real(queue, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(event.tag);
  return event;
}

grpc_event grpc_completion_queue_pluck(grpc_completion_queue* queue, void* tag,
                                       gpr_timespec deadline, void* reserved) {
  static const auto real = Find<grpc_event(grpc_completion_queue*, void*, gpr_timespec, void*)>(
      "grpc_completion_queue_pluck");
  const grpc_event event = real(queue, tag, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(tag);
  return event;
}

}  // extern "C"
