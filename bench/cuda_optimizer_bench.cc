// The optimizer's kernels and the staging ring on a GPU, each against what the same card does with
// a plain copy in the same run. Prints one table.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/support.h"
#include "common/base/float_cast.h"
#include "server/device/compute_pool.h"
#include "server/device/cuda/copy_kernel.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_status.h"
#include "server/device/cuda/cuda_stream.h"
#include "server/optim/cuda/step_executor.h"

ABSL_FLAG(uint64_t, parameters, uint64_t{1} << 30, "elements; fewer where memory is short");
ABSL_FLAG(uint64_t, tensors, 100000, "of the case with many tensors");
ABSL_FLAG(int, repeat, 11, "runs of each; the median counts");
ABSL_FLAG(uint64_t, transfer_bytes, uint64_t{1} << 30, "of one transfer through pinned memory");

namespace modelstate {
namespace {

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}
void Check(cudaError_t error, const char* what) { Check(CudaStatus(error, what)); }

// The median time of what `run` enqueues, as the device's clock has it.
class DeviceTimer {
 public:
  explicit DeviceTimer(const CudaStream& stream) : stream_(stream) {
    Check(cudaEventCreate(&begin_), "make an event");
    Check(cudaEventCreate(&end_), "make an event");
  }
  double Median(const std::function<void(int)>& before, const std::function<void()>& run) {
    std::vector<double> times;
    for (int i = -2; i < absl::GetFlag(FLAGS_repeat); ++i) {
      before(i + 2);
      Check(stream_.Synchronize());
      Check(cudaEventRecord(begin_, stream_.handle()), "record an event");
      run();
      Check(cudaEventRecord(end_, stream_.handle()), "record an event");
      Check(cudaEventSynchronize(end_), "wait for an event");
      float ms = 0;
      Check(cudaEventElapsedTime(&ms, begin_, end_), "read the time between events");
      if (i >= 0) times.push_back(ms / 1e3);
    }
    return modelstate::Median(times);
  }

 private:
  const CudaStream& stream_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

double MedianWall(const std::function<void()>& run) {
  std::vector<double> times;
  for (int i = -1; i < absl::GetFlag(FLAGS_repeat); ++i) {
    const double begin = Now();
    run();
    if (i >= 0) times.push_back(Now() - begin);
  }
  return Median(times);
}

struct Memory {
  uint64_t elements = 0;
  CudaMemory values[4];  // parameter, gradient, two slots: each of F32
};

// Numbers of usual size, as F32 and as two of BF16.
void Fill(const CudaStream& stream, const Memory& memory) {
  std::vector<uint32_t> some(1 << 20);
  uint32_t state = 1;
  for (uint32_t& value : some) {
    state = state * 1664525 + 1013904223;
    const uint32_t half =
        FloatToBFloat16((static_cast<float>(state >> 8) * 0x1p-24f + 1e-3f) * 1e-2f);
    value = half << 16 | half;
  }
  const uint64_t bytes = memory.elements * 4;
  uint64_t filled = std::min<uint64_t>(some.size() * 4, bytes);
  uint8_t* first = memory.values[0].data();
  Check(cudaMemcpyAsync(first, some.data(), filled, cudaMemcpyHostToDevice, stream.handle()),
        "fill memory");
  while (filled < bytes) {
    const uint64_t more = std::min(filled, bytes - filled);
    Check(cudaMemcpyAsync(first + filled, first, more, cudaMemcpyDeviceToDevice, stream.handle()),
          "fill memory");
    filled += more;
  }
  for (int i = 1; i < 4; ++i) {
    Check(cudaMemcpyAsync(memory.values[i].data(), first, bytes, cudaMemcpyDeviceToDevice,
                          stream.handle()),
          "fill memory");
  }
  Check(stream.Synchronize());
}

// As many elements as fit.
Memory MakeMemory(const CudaStream& stream) {
  size_t free = 0, total = 0;
  Check(cudaMemGetInfo(&free, &total), "ask for free memory");
  Memory memory;
  memory.elements = absl::GetFlag(FLAGS_parameters);
  while (memory.elements * 16 + (uint64_t{1} << 30) > free) memory.elements /= 2;
  const uint64_t bytes = memory.elements * 4;
  for (CudaMemory& value : memory.values) {
    value = OrDie(CudaMemory::Allocate(stream.device(), bytes));
  }
  Fill(stream, memory);
  return memory;
}

struct Case {
  const char* name;
  Algorithm algorithm;
  DType dtype;
  double bytes;  // read and written per parameter
};

// Step `step` of the case over `memory`: parameters and gradients change places.
StepPlan MakePlan(const Memory& memory, const Case& which, const StepOptions& options,
                  uint64_t tensors, uint64_t step) {
  const RuleInfo& rule = GetRule(which.algorithm);
  const Hyperparameters& h = options.hyperparameters[0];
  StepPlan plan;
  plan.algorithm = which.algorithm;
  plan.options = &options;
  plan.scalars.push_back(rule.make_scalars(h, step + 10, 1));
  uint8_t* first = memory.values[0].data();
  uint8_t* second = memory.values[1].data();
  if (step % 2 == 1) std::swap(first, second);
  const bool narrow = which.dtype != DType::kF32;
  const uint64_t width = narrow ? 2 : 4;
  const uint64_t each = memory.elements / tensors / 8 * 8;
  plan.tensor_memory = std::make_unique<TensorStep[]>(tensors);
  plan.tensors = absl::MakeSpan(plan.tensor_memory.get(), tensors);
  for (uint64_t t = 0; t < tensors; ++t) {
    const uint64_t at = t * each;
    TensorStep& tensor = plan.tensors[t];
    tensor.dtype = which.dtype;
    tensor.elements = tensors == 1 ? memory.elements : each;
    // A narrow one: parameter and gradient, its output, share one F32's place; the master has the
    // other.
    tensor.parameter = (narrow ? memory.values[0].data() : first) + at * width;
    tensor.output =
        narrow ? memory.values[0].data() + memory.elements * width + at * width : second + at * 4;
    if (narrow && step % 2 == 1) {
      uint8_t* output = tensor.output;
      tensor.output = memory.values[0].data() + at * width;
      tensor.parameter = output;
    }
    tensor.first_part = static_cast<uint32_t>(plan.parts.size());
    tensor.part_count = 1;
    tensor.in_place = !narrow;
    plan.parts.push_back({tensor.output, which.dtype, 1, 1});
    const auto slot = [&](size_t place, const CudaMemory& of) {
      tensor.slots[place].data = of.data() + at * 4;
      tensor.slots[place].from = tensor.slots[place].data;
    };
    if (narrow) slot(kMasterPlace, memory.values[1]);
    slot(kMasterPlace + 1, memory.values[2]);
    if (which.algorithm != Algorithm::kSgd) slot(kMasterPlace + 2, memory.values[3]);
  }
  return plan;
}

struct Copies {
  double memcpy_rate = 0, kernel_rate = 0;  // bytes read and written a second
};

void Row(const std::string& what, double seconds, double rate, const std::string& ratio) {
  std::printf("| %-58s | %10.3f | %8.1f | %s |\n", what.c_str(), seconds * 1e3, rate / 1e9,
              ratio.c_str());
  std::fflush(stdout);
}

std::string Ratio(double rate, const Copies& copies) {
  char text[64];
  std::snprintf(text, sizeof(text), "%5.3f of memcpy, %5.3f of copy kernel",
                rate / copies.memcpy_rate, rate / copies.kernel_rate);
  return text;
}

Copies MeasureCopies(const CudaStream& stream, const Memory& memory) {
  DeviceTimer timer(stream);
  const uint64_t bytes = memory.elements * 4;
  const auto nothing = [](int) {};
  Copies copies;
  const double by_memcpy = timer.Median(nothing, [&] {
    Check(cudaMemcpyAsync(memory.values[1].data(), memory.values[0].data(), bytes,
                          cudaMemcpyDeviceToDevice, stream.handle()),
          "copy");
  });
  copies.memcpy_rate = 2.0 * static_cast<double>(bytes) / by_memcpy;
  Row("copy, cudaMemcpyAsync device to device", by_memcpy, copies.memcpy_rate, "");
  const double by_kernel = timer.Median(nothing, [&] {
    Check(LaunchCopy(memory.values[1].data(), memory.values[0].data(), bytes, stream.handle()),
          "copy");
  });
  copies.kernel_rate = 2.0 * static_cast<double>(bytes) / by_kernel;
  Row("copy, a kernel of 16-byte accesses", by_kernel, copies.kernel_rate, "");
  return copies;
}

void MeasureSteps(const CudaStream& stream, const Memory& memory, const Copies& copies) {
  constexpr Case kCases[] = {{"AdamW F32", Algorithm::kAdamW, DType::kF32, 28},
                             {"Adam F32", Algorithm::kAdam, DType::kF32, 28},
                             {"SGD momentum F32", Algorithm::kSgd, DType::kF32, 20},
                             {"AdamW BF16, F32 master", Algorithm::kAdamW, DType::kBF16, 28}};
  DeviceTimer timer(stream);
  ComputePool compute(std::max(1u, std::thread::hardware_concurrency()));
  for (const Case& which : kCases) {
    StepOptions options;
    options.hyperparameters = {GetRule(which.algorithm).defaults()};
    if (which.algorithm == Algorithm::kSgd) options.hyperparameters[0].momentum = 0.9;
    for (const uint64_t tensors : {uint64_t{1}, absl::GetFlag(FLAGS_tensors)}) {
      CudaStepExecutor executor = OrDie(CudaStepExecutor::Create(stream));
      Fill(stream, memory);
      const StepPlan plans[2] = {MakePlan(memory, which, options, tensors, 0),
                                 MakePlan(memory, which, options, tensors, 1)};
      const std::string name =
          absl::StrCat(which.name, ", ", tensors, tensors == 1 ? " tensor" : " tensors");
      const uint64_t elements =
          tensors == 1 ? memory.elements : memory.elements / tensors / 8 * 8 * tensors;
      const double count = static_cast<double>(elements);
      const auto row = [&](const char* what, double seconds, double bytes) {
        Row(absl::StrCat(name, ": ", what), seconds, bytes / seconds,
            Ratio(bytes / seconds, copies));
      };
      const double update =
          timer.Median([&](int step) { Check(executor.Prepare(plans[step % 2], compute)); },
                       [&] { Check(executor.Update(0.9)); });
      row("update", update, which.bytes * count);
      const double read = static_cast<double>(DTypeSize(which.dtype)) * count;
      row("norm", MedianWall([&] { Check(executor.ComputeNorms().status()); }), read);
      int step = 0;
      row("lists, norm, update", MedianWall([&] {
            Check(executor.Prepare(plans[step++ % 2], compute));
            Check(executor.ComputeNorms().status());
            Check(executor.Update(0.9));
            Check(stream.Synchronize());
          }),
          which.bytes * count + read);
    }
  }
}

void MeasureTransfers(const CudaStream& stream, const Memory& memory) {
  const uint64_t bytes = std::min(absl::GetFlag(FLAGS_transfer_bytes), memory.elements * 4);
  uint8_t* device = memory.values[0].data();
  const double size = static_cast<double>(bytes);
  const PinnedMemory pinned = OrDie(PinnedMemory::Allocate(bytes));
  std::memset(pinned.data(), 1, bytes);
  std::vector<uint8_t> pageable(bytes, 1);
  double plain[2];
  for (const bool down : {true, false}) {
    plain[down] = MedianWall([&] {
      Check(
          cudaMemcpyAsync(down ? pinned.data() : device, down ? device : pinned.data(), bytes,
                          down ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream.handle()),
          "copy");
      Check(stream.Synchronize());
    });
    Row(down ? "device to pinned memory, one cudaMemcpy"
             : "pinned memory to device, one cudaMemcpy",
        plain[down], size / plain[down], "");
  }
  const std::unique_ptr<Device> gpu = OrDie(MakeDevice("cuda:0", bytes));
  DeviceBuffer buffer = OrDie(gpu->pool()->Allocate(bytes));
  const auto row = [&](const std::string& name, bool down, double seconds) {
    char ratio[40];
    std::snprintf(ratio, sizeof(ratio), "%5.3f of one cudaMemcpy", plain[down] / seconds);
    Row(name, seconds, size / seconds, ratio);
  };
  for (const bool copies : {false, true}) {
    const char* and_copies = copies ? ", and a memcpy on the host" : "";
    for (const uint64_t block : {uint64_t{1} << 20, uint64_t{4} << 20}) {
      const double seconds = MedianWall([&] {
        const std::unique_ptr<HostReader> reader = OrDie(gpu->NewReader(block));
        std::shared_ptr<HostRead> next;
        for (uint64_t at = 0; at <= bytes; at += block) {
          const std::shared_ptr<HostRead> read = std::move(next);
          if (at < bytes) {
            const BufferRange range = {&buffer, at, std::min(block, bytes - at)};
            next = OrDie(reader->Start({&range, 1}));
          }
          if (read == nullptr) continue;
          const absl::Span<const uint8_t> part = OrDie(read->Wait());
          if (copies) std::memcpy(pageable.data() + at - block, part.data(), part.size());
        }
      });
      row(absl::StrCat("HostReader, blocks of ", block >> 20, " MiB", and_copies), true, seconds);
    }
    const double seconds = MedianWall([&] {
      const std::unique_ptr<HostWriter> writer = OrDie(gpu->NewWriter(bytes));
      for (uint64_t at = 0; at < bytes;) {
        const absl::Span<uint8_t> to = writer->Reserve(buffer, at, bytes - at);
        if (copies) std::memcpy(to.data(), pageable.data() + at, to.size());
        at += to.size();
      }
      Check(writer->Finish());
    });
    row(absl::StrCat("HostWriter", and_copies), false, seconds);
  }
}

int Run() {
  if (CudaDeviceCount() == 0) {
    std::printf("skipped: no CUDA device\n");
    return 0;
  }
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0), "ask for the card");
  int driver = 0, runtime = 0;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  const CudaStream stream = OrDie(CudaStream::Create(0));
  const Memory memory = MakeMemory(stream);
  std::printf("%s, %d multiprocessors, driver for CUDA %d.%d, runtime %d.%d; %" PRIu64
              " parameters; medians of %d\n\n",
              properties.name, properties.multiProcessorCount, driver / 1000, driver % 1000 / 10,
              runtime / 1000, runtime % 1000 / 10, memory.elements, absl::GetFlag(FLAGS_repeat));
  std::printf("| %-58s | %10s | %8s | ratio |\n|---|---|---|---|\n", "what", "ms", "GB/s");
  const Copies copies = MeasureCopies(stream, memory);
  MeasureSteps(stream, memory, copies);
  MeasureTransfers(stream, memory);
  return 0;
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  return modelstate::Run();
}
