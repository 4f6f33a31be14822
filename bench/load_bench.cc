// Loads of a checkpoint file that is in the page cache, through a real server process, against
// pread by as many threads as the machine has, in the same run, interleaved.
//
//   build/release/bin/load_bench [--mib=1024] [--rounds=7] [--server=PATH]
//
// Where the bytes land decides, so there are two baselines: pread into memory that was touched
// before, which is what a reload finds in the pool, and into new huge pages, which is what a new
// module gets.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "bench/read_file.h"
#include "bench/server_process.h"
#include "client/client.h"
#include "common/base/digest.h"
#include "common/format/safetensors_writer.h"

ABSL_FLAG(int, mib, 1024, "size of the file");
ABSL_FLAG(int, rounds, 7, "rounds, each measuring every row once");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");

namespace modelstate {
namespace {

// Of many small and a few large tensors, as in a transformer.
std::vector<TensorSpec> Specs(uint64_t bytes) {
  constexpr uint64_t kSizes[] = {64 << 20, 16 << 20, 16 << 20, 4 << 20, 1 << 20, 16 << 10, 4 << 10};
  std::vector<TensorSpec> specs;
  uint64_t sum = 0;
  for (size_t i = 0; sum < bytes; ++i) {
    const uint64_t size = std::min(kSizes[i % std::size(kSizes)], bytes - sum);
    TensorSpec& spec = specs.emplace_back();
    spec.name = absl::StrCat("layer", i / std::size(kSizes), ".part", i % std::size(kSizes));
    spec.shape = OrDie(Shape::Create({static_cast<int64_t>(size / sizeof(float))}));
    sum += size;
  }
  return specs;
}

// With digests of its tensors, or as others write it.
void WriteFile(const std::string& path, const std::vector<TensorSpec>& specs, bool with_digests) {
  const StateLayout layout(specs);
  std::vector<uint8_t> data(layout.total_bytes());
  uint64_t state = 1;
  for (size_t i = 0; i + 8 <= data.size(); i += 8) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    std::memcpy(data.data() + i, &state, sizeof(state));
  }
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (with_digests) {
    std::vector<uint64_t> digests;
    for (size_t i = 0; i < specs.size(); ++i) {
      const ByteRange range = layout.range(i);
      digests.push_back(Xxh3(absl::MakeConstSpan(data).subspan(range.begin, range.size())));
    }
    metadata.emplace(kDigestsMetadataKey, DigestsMetadata(specs, digests));
  }
  const std::string header = OrDie(SafetensorsHeader(specs, layout, metadata));
  std::ofstream file(path, std::ios::binary);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
}

uint8_t* HugePages(size_t size) {
  constexpr size_t kHuge = size_t{2} << 20;
  void* at =
      mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::abort();
  madvise(at, size + kHuge, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(at);
}

struct Row {
  std::string name;
  size_t baseline;
  std::function<void()> run;
  std::function<void()> after = [] {};
  std::vector<double> seconds = {};
};

void Run(const std::string& binary) {
  const uint64_t bytes = static_cast<uint64_t>(absl::GetFlag(FLAGS_mib)) << 20;
  const ServerProcess server(binary);
  const Client client = ConnectNear(server.target());
  const std::vector<TensorSpec> specs = Specs(bytes);
  const std::string plain = absl::StrCat(server.root(), "/plain.safetensors");
  const std::string digests = absl::StrCat(server.root(), "/digests.safetensors");
  WriteFile(plain, specs, false);
  WriteFile(digests, specs, true);
  const int fd = open(plain.c_str(), O_RDONLY);
  const size_t size = std::filesystem::file_size(plain);
  const unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  std::vector<uint8_t> touched(size, 1);

  client::LoadCheckpointOptions anew;
  anew.create_module = true;
  for (const char* name : {"plain", "digests"}) {
    OrDie(client.LoadCheckpoint(absl::StrCat("kept-", name), absl::StrCat(name, ".safetensors"),
                                anew));
  }
  const auto load_new = [&client, &anew](const std::string& name) {
    return [&client, &anew, name] {
      OrDie(client.LoadCheckpoint("new", absl::StrCat(name, ".safetensors"), anew));
    };
  };
  const auto drop_new = [&client] {
    if (!client.DeleteModule("new").ok()) std::exit(1);
  };
  const auto reload = [&client](const std::string& name) {
    return [&client, name] {
      OrDie(client.LoadCheckpoint(absl::StrCat("kept-", name), absl::StrCat(name, ".safetensors")));
    };
  };
  uint8_t* pages = nullptr;
  std::vector<Row> rows = {
      {"pread into touched memory", 0, [&] { ReadWith(threads, fd, touched.data(), size); }},
      {"pread into new huge pages", 1,
       [&] {
         pages = HugePages(size);
         ReadWith(threads, fd, pages, size);
       },
       [&] { munmap(pages, size + (size_t{2} << 20)); }},
      {"load into a new module", 1, load_new("plain"), drop_new},
      {"the same, digests checked", 1, load_new("digests"), drop_new},
      {"reload", 0, reload("plain")},
      {"the same, digests checked", 0, reload("digests")},
  };
  for (int round = -1; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (Row& row : rows) {
      const double begin = Now();
      row.run();
      if (round >= 0) row.seconds.push_back(Now() - begin);
      row.after();
    }
  }
  std::printf("%zu tensors, %d MiB in the page cache, %u threads, %d rounds, medians\n",
              specs.size(), absl::GetFlag(FLAGS_mib), threads, absl::GetFlag(FLAGS_rounds));
  std::printf("%-28s %8s %8s %8s\n", "", "GB/s", "fastest", "ratio");
  for (const Row& row : rows) {
    std::vector<double> ratios;
    for (size_t i = 0; i < row.seconds.size(); ++i) {
      ratios.push_back(rows[row.baseline].seconds[i] / row.seconds[i]);
    }
    const double gigabytes = static_cast<double>(size) / 1e9;
    std::printf("%-28s %8.2f %8.2f %8.2f\n", row.name.c_str(), gigabytes / Median(row.seconds),
                gigabytes / *std::min_element(row.seconds.begin(), row.seconds.end()),
                Median(ratios));
  }
  close(fd);
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
