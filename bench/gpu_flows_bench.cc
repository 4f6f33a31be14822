// A server with a module on a GPU beside one with a module in host memory, in turns: fetches, a
// load, a save and a push.
//
//   build/cuda/bin/gpu_flows_bench [--bytes=1073741824] [--rounds=9] [--server=PATH]

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/payload.h"
#include "bench/read_file.h"
#include "bench/server_process.h"
#include "bench/turns.h"
#include "client/client.h"
#include "common/format/safetensors_writer.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_status.h"
#include "server/device/cuda/cuda_stream.h"

ABSL_FLAG(uint64_t, bytes, uint64_t{1} << 30, "of parameters, in mixed tensors");
ABSL_FLAG(int, rounds, 9, "rounds, each measuring every row once");
ABSL_FLAG(std::vector<std::string>, rows,
          (std::vector<std::string>{"fetch", "load", "push", "save"}), "what to measure");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");

namespace modelstate {
namespace {

// One server with the payload as a module under AdamW, and the same as a file.
class Place {
 public:
  Place(const std::string& binary, const std::string& device, const Payload& payload)
      : payload_(payload),
        server_(binary, device,
                {absl::StrCat("--io_threads=", std::max(4U, std::thread::hardware_concurrency()))}),
        client_(ConnectNear(server_.target())) {
    OrDie(client_.CreateModule("bench", payload.specs()));
    OrDie(client_.LoadStateDict("bench", payload.Tensors(TensorKind::kParameter)));
    client::OptimizerConfig config;
    config.algorithm = client::Algorithm::kAdamW;
    OrDie(client_.ConfigureOptimizer("bench", config));
    const StateLayout layout(payload.specs());
    const std::string header =
        OrDie(SafetensorsHeader(payload.specs(), layout, {{"format", "pt"}}));
    std::ofstream file(path(), std::ios::binary);
    file.write(header.data(), static_cast<std::streamsize>(header.size()));
    file.write(reinterpret_cast<const char*>(payload.bytes().data()),
               static_cast<std::streamsize>(payload.bytes().size()));
  }

  std::string path() const { return absl::StrCat(server_.root(), "/plain.safetensors"); }
  const std::string& root() const { return server_.root(); }

  double Fetch() {
    client::FetchOptions options;
    options.digests = false;
    return Seconds([&] { OrDie(client_.Fetch("bench", options)); });
  }
  double Load() {
    return Seconds([&] { OrDie(client_.LoadCheckpoint("bench", "plain.safetensors")); });
  }
  double Save() {
    client::SaveCheckpointOptions options;
    options.overwrite = true;
    return Seconds([&] { OrDie(client_.SaveCheckpoint("bench", "saved", options)); });
  }
  double Push() {
    client::StepOptions options;
    options.digests = false;
    return Seconds([&] {
      OrDie(client_.ApplyStep("bench", payload_.Tensors(TensorKind::kGradient), options));
    });
  }

 private:
  const Payload& payload_;
  const ServerProcess server_;
  const Client client_;
};

// By as many threads as the machine has, into memory that was touched before.
double ReadFile(const std::string& path, std::vector<uint8_t>& to) {
  const int fd = open(path.c_str(), O_RDONLY);
  const unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  const double seconds = Seconds([&] { ReadWith(threads, fd, to.data(), to.size()); });
  close(fd);
  return seconds;
}

void Run(const std::string& binary) {
  if (CudaDeviceCount() == 0) {
    std::printf("skipped: no CUDA device\n");
    return;
  }
  const Payload payload(MixedTensors(absl::GetFlag(FLAGS_bytes)));
  const uint64_t bytes = payload.bytes().size();
  Place host(binary, "cpu", payload);
  Place gpu(binary, "cuda:0", payload);
  const CudaStream stream = OrDie(CudaStream::Create(0));
  const PinnedMemory pinned = OrDie(PinnedMemory::Allocate(bytes));
  const CudaMemory memory = OrDie(CudaMemory::Allocate(0, bytes));
  std::vector<uint8_t> touched(bytes, 1);

  Turns turns;
  double fetched = 0, read = 0, copied = 0;
  for (const std::string& row : absl::GetFlag(FLAGS_rows)) {
    if (row == "fetch") {
      turns.Add("fetch from host memory", [&] { return fetched = host.Fetch(); });
      turns.Add("fetch from the GPU", [&] {
        const double seconds = gpu.Fetch();
        turns.Record("fetch: GPU / host memory", fetched / seconds);
        return seconds;
      });
    } else if (row == "load") {
      turns.Add("pread of the file", [&] { return read = ReadFile(gpu.path(), touched); });
      turns.Add("one pinned copy to the GPU", [&] {
        return copied = Seconds([&] {
                 OrDie(CudaStatus(cudaMemcpyAsync(memory.data(), pinned.data(), bytes,
                                                  cudaMemcpyHostToDevice, stream.handle()),
                                  "copy"));
                 OrDie(stream.Synchronize());
               });
      });
      turns.Add("load to host memory", [&] { return host.Load(); });
      turns.Add("load to the GPU", [&] {
        const double seconds = gpu.Load();
        turns.Record("load: GPU / the slower of pread and copy", std::max(read, copied) / seconds);
        return seconds;
      });
    } else if (row == "push") {
      turns.Add("push and AdamW in host memory", [&] { return host.Push(); });
      turns.Add("push and AdamW on the GPU", [&] { return gpu.Push(); });
    } else if (row == "save") {
      turns.Add("save from host memory", [&] { return host.Save(); });
      turns.Add("save from the GPU", [&] { return gpu.Save(); });
    } else {
      std::fprintf(stderr, "--rows: there is no %s\n", row.c_str());
      std::exit(1);
    }
  }
  std::printf("%zu tensors, %.0f MiB, %d rounds, medians\n", payload.specs().size(),
              static_cast<double>(bytes) / (1 << 20), absl::GetFlag(FLAGS_rounds));
  turns.Run(absl::GetFlag(FLAGS_rounds));
  turns.PrintMedians();
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
