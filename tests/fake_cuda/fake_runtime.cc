// The CUDA runtime's functions that this project uses, on the host's memory.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "server/device/cuda/launch_kernel.h"
#include "tests/fake_cuda/fake_cuda.h"

// What the handles point to: the names are CUDA's.
struct CUevent_st {
  uint64_t recorded = 0;  // how often
  uint64_t passed = 0;    // up to which of them
  int device = 0;
};

namespace {

// One piece of enqueued work.
struct Operation {
  std::function<void()> run;          // null: none
  std::shared_ptr<CUevent_st> event;  // to wait for, or to pass
  uint64_t generation = 0;            // of the event
  bool waits = false;
  const void* host = nullptr;    // the host's memory that it uses; null: none
  const void* memory = nullptr;  // the device's; null: any
  size_t bytes = 0;
};

}  // namespace

struct CUstream_st {
  int device = 0;
  std::deque<Operation> queue;
  bool destroyed = false;
};

namespace modelstate {
namespace {

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "fake CUDA: %s\n", what);
  std::abort();
}

constexpr int kDevices = 2;
thread_local int current_device = 0;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

class Runtime {
 public:
  static Runtime& Get() {
    static Runtime* runtime = new Runtime();
    return *runtime;
  }

  std::recursive_mutex mutex;  // of everything here
  std::mt19937_64 random{FromEnvironment("FAKE_CUDA_SEED", 1)};
  std::list<CUstream_st> streams;
  std::map<CUevent_st*, std::shared_ptr<CUevent_st>> events;
  std::map<uint8_t*, size_t> device, pinned;
  uint64_t calls = 0, pageable_copies = 0;
  uint64_t fail_at = FromEnvironment("FAKE_CUDA_STICKY_AT", 0);
  cudaError_t failure = cudaErrorIllegalAddress, last = cudaSuccess;
  bool sticky = fail_at != 0;

  // What a counted call returns before it acts.
  cudaError_t Call() {
    ++calls;
    if (fail_at == 0 || calls < fail_at || (calls > fail_at && !sticky)) {
      RunSome();
      return cudaSuccess;
    }
    // Such an error ends all work.
    if (sticky) {
      for (CUstream_st& stream : streams) stream.queue.clear();
      for (auto& [event, owner] : events) event->passed = event->recorded;
    }
    return last = failure;
  }

  void Enqueue(cudaStream_t stream, Operation operation) {
    if (stream == nullptr) Die("the default stream is used");
    stream->queue.push_back(std::move(operation));
  }

  // Runs the first operation of a stream, if it may run now.
  bool RunOne(CUstream_st& stream) {
    if (stream.queue.empty()) return false;
    Operation& next = stream.queue.front();
    if (next.waits && next.event->passed < next.generation) return false;
    if (next.run) {
      Protect(PROT_READ | PROT_WRITE);
      next.run();
      Protect(PROT_NONE);
    }
    if (!next.waits && next.event) next.event->passed = next.generation;
    stream.queue.pop_front();
    return true;
  }

  // Most often nothing: work is late.
  void RunSome() {
    if (streams.empty() || random() % 4 != 0) return;
    for (uint64_t n = random() % 4; n > 0; --n) {
      auto stream = streams.begin();
      std::advance(stream, random() % streams.size());
      RunOne(*stream);
    }
  }

  // Until `done`; other streams go on too, as the seed says.
  template <typename Done>
  void RunUntil(CUstream_st* stream, Done done) {
    while (!done()) {
      bool any = stream != nullptr && random() % 2 == 0 && RunOne(*stream);
      for (CUstream_st& other : streams) any |= random() % 2 == 0 && RunOne(other);
      if (any) continue;
      for (CUstream_st& other : streams) any |= RunOne(other);
      if (!any) Die("work waits for what is never done");
    }
  }

  static bool Overlaps(const void* used, size_t bytes, const uint8_t* data, size_t size) {
    const auto* begin = static_cast<const uint8_t*>(used);
    return begin != nullptr && begin < data + size && data < begin + bytes;
  }
  static bool UsesPinned(const Operation& operation, const uint8_t* data, size_t size) {
    return Overlaps(operation.host, operation.bytes, data, size);
  }
  // What a kernel uses is not known.
  static bool UsesDevice(const Operation& operation, const uint8_t* data, size_t size) {
    if (!operation.run) return false;
    return operation.memory == nullptr || Overlaps(operation.memory, operation.bytes, data, size);
  }

  void Free(std::map<uint8_t*, size_t>& memory, void* data, bool pins) {
    const auto it = memory.find(static_cast<uint8_t*>(data));
    if (it == memory.end()) Die("memory is freed that was not allocated so");
    for (const CUstream_st& stream : streams) {
      for (const Operation& operation : stream.queue) {
        if (pins ? UsesPinned(operation, it->first, it->second)
                 : UsesDevice(operation, it->first, it->second)) {
          Die(pins ? "pinned memory is freed that a copy still needs"
                   : "device memory is freed while work is pending");
        }
      }
    }
    munmap(it->first, Pages(it->second));
    memory.erase(it);
  }

  // Whether it lies in one allocation.
  static bool Holds(const std::map<uint8_t*, size_t>& memory, const void* data, size_t size) {
    const auto* begin = static_cast<const uint8_t*>(data);
    auto it = memory.upper_bound(const_cast<uint8_t*>(begin));
    if (it == memory.begin()) return false;
    --it;
    return begin + size <= it->first + it->second;
  }

  static size_t Pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

 private:
  void Protect(int how) {
    for (const auto& [data, bytes] : device) mprotect(data, Pages(bytes), how);
  }
};

constexpr size_t kAddresses = size_t{1} << 44;  // never used twice

cudaError_t Allocate(std::map<uint8_t*, size_t>& memory, void** data, size_t bytes, bool device) {
  if (bytes > (size_t{1} << 30)) return Runtime::Get().last = cudaErrorMemoryAllocation;
  const size_t size = Runtime::Pages(bytes);
  // Side by side, as a driver may do it: who goes over the end is in another allocation.
  static uint8_t* next = static_cast<uint8_t*>(
      mmap(nullptr, kAddresses, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  void* mapped = mmap(next, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (mapped == MAP_FAILED) return Runtime::Get().last = cudaErrorMemoryAllocation;
  next += size;
  std::memset(mapped, 0xFF, size);  // NaNs
  if (device) mprotect(mapped, size, PROT_NONE);
  memory[static_cast<uint8_t*>(mapped)] = bytes;
  *data = mapped;
  return cudaSuccess;
}

}  // namespace

void FakeCudaSeed(uint64_t seed) {
  const std::lock_guard lock(Runtime::Get().mutex);
  Runtime::Get().random.seed(seed);
}

void FakeCudaFail(uint64_t call, cudaError_t error, bool sticky) {
  Runtime& runtime = Runtime::Get();
  const std::lock_guard lock(runtime.mutex);
  runtime.calls = 0;
  runtime.fail_at = call;
  runtime.failure = error;
  runtime.sticky = sticky;
  runtime.last = cudaSuccess;
}

uint64_t FakeCudaCalls() {
  const std::lock_guard lock(Runtime::Get().mutex);
  return Runtime::Get().calls;
}
uint64_t FakeCudaPageableCopies() {
  const std::lock_guard lock(Runtime::Get().mutex);
  return Runtime::Get().pageable_copies;
}

cudaError_t FakeLaunch(unsigned blocks, unsigned threads, cudaStream_t stream,
                       std::function<void()> thread) {
  Runtime& runtime = Runtime::Get();
  const std::lock_guard lock(runtime.mutex);
  if (stream->device != current_device) return runtime.last = cudaErrorInvalidResourceHandle;
  if (const cudaError_t error = runtime.Call(); error != cudaSuccess) return error;
  Operation operation;
  operation.run = [blocks, threads, thread] { FakeRunKernel(blocks, threads, thread); };
  runtime.Enqueue(stream, std::move(operation));
  return cudaSuccess;
}

}  // namespace modelstate

using modelstate::Allocate;
using modelstate::kDevices;
using modelstate::Runtime;

#define FAKE_LOCK() const std::lock_guard lock(Runtime::Get().mutex)
#define FAKE_CALL() \
  FAKE_LOCK();      \
  if (const cudaError_t error = Runtime::Get().Call(); error != cudaSuccess) return error

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = modelstate::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  FAKE_LOCK();
  if (device < 0 || device >= kDevices) return Runtime::Get().last = cudaErrorInvalidDevice;
  modelstate::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  FAKE_LOCK();
  Runtime& runtime = Runtime::Get();
  const cudaError_t error = runtime.last;
  if (!runtime.sticky) runtime.last = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    default:
      return "another error";
  }
}
const char* cudaGetErrorString(cudaError_t) { return "of the fake"; }
cudaError_t cudaMalloc(void** data, size_t bytes) {
  FAKE_CALL();
  return Allocate(Runtime::Get().device, data, bytes, true);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  FAKE_CALL();
  *free = *total = size_t{1} << 30;
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  FAKE_LOCK();
  Runtime::Get().Free(Runtime::Get().device, data, false);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  FAKE_CALL();
  return Allocate(Runtime::Get().pinned, data, bytes, false);
}
cudaError_t cudaFreeHost(void* data) {
  FAKE_LOCK();
  Runtime::Get().Free(Runtime::Get().pinned, data, true);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  FAKE_CALL();
  if (flags != cudaStreamNonBlocking) modelstate::Die("a stream that waits for the default stream");
  *stream = &Runtime::Get().streams.emplace_back();
  (*stream)->device = modelstate::current_device;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  FAKE_LOCK();
  Runtime& runtime = Runtime::Get();
  // A real one goes on with what is pending; nobody could tell when.
  runtime.RunUntil(stream, [&] { return stream->queue.empty(); });
  runtime.streams.remove_if([&](const CUstream_st& each) { return &each == stream; });
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  FAKE_CALL();
  Runtime::Get().RunUntil(stream, [&] { return stream->queue.empty(); });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  FAKE_CALL();
  Operation operation;
  operation.event = Runtime::Get().events.at(event);
  operation.generation = event->recorded;
  operation.waits = true;
  Runtime::Get().Enqueue(stream, std::move(operation));
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  FAKE_CALL();
  const auto made = std::make_shared<CUevent_st>();
  made->device = modelstate::current_device;
  Runtime::Get().events[made.get()] = made;
  *event = made.get();
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  FAKE_LOCK();
  Runtime::Get().events.erase(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  FAKE_CALL();
  Operation operation;
  operation.event = Runtime::Get().events.at(event);
  if (event->device != stream->device) return Runtime::Get().last = cudaErrorInvalidResourceHandle;
  operation.generation = ++event->recorded;
  Runtime::Get().Enqueue(stream, std::move(operation));
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  FAKE_CALL();
  Runtime::Get().RunUntil(nullptr, [&] { return event->passed >= event->recorded; });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  FAKE_CALL();
  return event->passed >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  FAKE_CALL();
  Runtime& runtime = Runtime::Get();
  Operation operation;
  operation.run = [to, from, bytes] { std::memcpy(to, from, bytes); };
  operation.memory = kind == cudaMemcpyHostToDevice ? to : from;
  if (!Runtime::Holds(runtime.device, operation.memory, bytes)) {
    return runtime.last = cudaErrorInvalidValue;
  }
  if (kind == cudaMemcpyHostToDevice) operation.host = from;
  if (kind == cudaMemcpyDeviceToHost) operation.host = to;
  operation.bytes = bytes;
  const bool waits =
      operation.host != nullptr && !Runtime::Holds(runtime.pinned, operation.host, bytes);
  runtime.Enqueue(stream, std::move(operation));
  if (waits) {
    ++runtime.pageable_copies;
    runtime.RunUntil(stream, [&] { return stream->queue.empty(); });
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  FAKE_CALL();
  Operation operation;
  operation.run = [to, value, bytes] { std::memset(to, value, bytes); };
  operation.memory = to;
  operation.bytes = bytes;
  Runtime::Get().Enqueue(stream, std::move(operation));
  return cudaSuccess;
}

}  // extern "C"
